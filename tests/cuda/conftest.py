"""Tests of what a GPU does: `pytest -m cuda`. Without a GPU, `pytest -m cuda --device cpu` runs the same code.

The tests of the other folders use the CPU alone, on whatever machine they run.
"""

from pathlib import Path

import pytest
import torch

from spec.workers import Worker
from tests.spec.training.runs import make_store

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.cuda)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    found = torch.device(request.config.getoption("--device"))
    if found.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is here")
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" else found


@pytest.fixture(scope="session")
def worker(device: torch.device) -> Worker:
    return Worker(0, 1, device)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up features of 30 sequences to train on and 7 for val."""
    return make_store(tmp_path_factory.mktemp("store"))

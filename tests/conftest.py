"""What all tests share: a tiny base model on the disk, and no way to the network or the user's caches."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported
# pytest puts this folder on sys.path, where tests/spec would be found before an editable install's spec.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

from spec import base as base_model
from spec.base import Base
from spec.config import Model
from tests.tiny import make_base


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", choices=["cuda", "cpu"], help="for the tests marked cuda")


@pytest.fixture(autouse=True, scope="session")
def _isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the tests' own; one thread, since more cost more than they give at these sizes; no waiting
    for the disk, since nothing here has to outlive a crash of the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        for name in ("MLFLOW_TRACKING_URI", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        patch.setattr(os, "fsync", lambda handle: None)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base of GPT-2's shape; not to be written to."""
    return make_base(tmp_path_factory.mktemp("base") / "gpt2")


@pytest.fixture(scope="session")
def base(base_folder: Path) -> Base:
    """That base, loaded in float32."""
    digest = base_model.identify(base_folder)["weights"]
    return base_model.load(Model(), base_folder, digest, torch.device("cpu"), dtype="float32")

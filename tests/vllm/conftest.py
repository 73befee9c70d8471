"""What the tests of serving share; run in an environment with vLLM (make test-vllm)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vllm import small
from tests.vllm.small import Trained


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return small.train_small(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return small.train_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True, scope="session")
def _offline_telemetry() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.ENVIRONMENT.items():
            patch.setenv(name, value)
        yield

"""A folder in which everything up to cache has run, made once for all tests of stages, and copies of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stages.workspace import content, copy_of, inline_workers, prepare, run_through


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Not to be changed: other tests read it, and its store is that of every copy."""
    root = prepare(tmp_path_factory.mktemp("ready"))
    before = content(root / "base")
    run_through(root, "cache")
    yield root
    assert content(root / "base") == before


@pytest.fixture
def folder(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, as the working directory, with workers in this process."""
    monkeypatch.chdir(copy_of(ready, tmp_path))
    inline_workers(monkeypatch)
    return tmp_path

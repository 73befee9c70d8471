"""Checkpoints: whole or absent, and never another run's."""

from pathlib import Path

import pytest
import torch

from spec import heads
from spec.heads import Speculator
from spec.training.resume import Checkpoints
from tests.spec.training.runs import make_speculator


@pytest.fixture
def speculator() -> Speculator:
    return make_speculator()


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "run", "key")


def saved(checkpoints: Checkpoints, speculator: Speculator, *steps: int) -> list[Path]:
    for step in steps:
        checkpoints.save(step, speculator, {"optimizer": {"a": torch.ones(2)}, "seen": step * 2})
    return [checkpoints.folder / f"global_step_{step}" for step in steps]


def test_the_newest_is_taken_up(checkpoints: Checkpoints, speculator: Speculator) -> None:
    assert checkpoints.newest() is None
    checkpoints.finish()
    saved(checkpoints, speculator, 5, 20, 100)  # 100 sorts before 20 as text
    found = checkpoints.newest()
    assert (found["step"], found["seen"]) == (100, 200)
    assert torch.equal(found["optimizer"]["a"], torch.ones(2))


def test_the_newest_goes_before_one_that_kept_its_state(checkpoints: Checkpoints, speculator: Speculator) -> None:
    """As a kill between the two leaves them."""
    (older,) = saved(checkpoints, speculator, 20)
    content = (older / "training.pt").read_bytes()
    saved(checkpoints, speculator, 100)
    (older / "training.pt").write_bytes(content)
    found = checkpoints.newest()
    assert found["step"] == 100


def test_older_and_finished_checkpoints_keep_the_speculator(checkpoints: Checkpoints, speculator: Speculator) -> None:
    older, newer = saved(checkpoints, speculator, 1, 2)
    assert sorted(path.name for path in older.iterdir()) == ["config.json", "pytorch_model.bin"]
    assert sorted(path.name for path in newer.iterdir()) == ["config.json", "pytorch_model.bin", "training.pt"]
    checkpoints.finish()
    assert checkpoints.newest() is None
    for folder in (older, newer):
        loaded = heads.load(folder)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), speculator.parameters(), strict=True))


def test_another_runs_state_is_never_taken_up(checkpoints: Checkpoints, speculator: Speculator) -> None:
    saved(checkpoints, speculator, 3)
    assert Checkpoints(checkpoints.folder, "other").newest() is None
    assert checkpoints.newest() is not None

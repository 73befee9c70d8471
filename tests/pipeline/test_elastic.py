"""A worker that is killed: in caching the next run takes over, in training torchrun starts the workers again."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from stages import common
from tests.pipeline.groups import CURVES, curve, two_groups
from tests.stages.workspace import content, copy_of, inline_workers, ok, prepare, run_through
from tests.tiny import write_prompts

pytestmark = pytest.mark.slow

DATA = "respond.source=data"
TRAIN = (DATA, "trainer.total_epochs=1", "trainer.save_freq=5", "trainer.test_freq=40")
PATIENCE = 300


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which one worker, this process, has done everything up to cache."""
    root = prepare(tmp_path_factory.mktemp("single"))
    write_prompts(root / "prompts", train=600)
    run_through(root, "cache", DATA)
    return root


class Command:
    """A stage as users call it, in processes of its own."""

    def __init__(self, folder: Path, name: str, *overrides: str) -> None:
        command = [sys.executable, "-m", "stages.cli", name]
        command += [part for override in overrides for part in ("-S", override)]
        environment = common.child_environment() | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, cwd=folder, env=environment, stdout=-1, stderr=-2, text=True)

    def kill_a_worker(self, when: Callable[[], bool]) -> None:
        """SIGKILL to one worker as soon as this is so."""
        deadline = time.monotonic() + PATIENCE
        while not when():
            assert self._process.poll() is None, "it ended too soon"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        children = psutil.Process(self._process.pid).children(recursive=True)
        workers = [child for child in children if "WORLD_SIZE" in child.environ()]
        assert len(workers) == 2
        workers[-1].kill()

    def end(self) -> tuple[int, str]:
        said, _ = self._process.communicate(timeout=PATIENCE)
        return self._process.returncode, said


def segments(store: Path) -> set[str]:
    return {path.parent.name for path in store.glob("states-*/*/record.json")}


@pytest.mark.parametrize("groups", [1, 2])
def test_the_next_run_takes_over(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    copy_of(single, tmp_path)
    for path in (tmp_path / "data/features").iterdir():
        path.unlink()
    store = f"features.store={tmp_path}/store"
    launcher = "torchrun --standalone --nproc-per-node=2" if groups == 1 else two_groups(tmp_path)
    command = Command(tmp_path, "cache", DATA, store, f"trainer.launcher={launcher}")
    command.kill_a_worker(lambda: len(segments(tmp_path / "store")) > 2)
    status, said = command.end()
    assert status == 1
    assert "a worker failed" in said
    assert not (tmp_path / "data/features/train.json").exists()
    monkeypatch.chdir(tmp_path)
    inline_workers(monkeypatch)
    found = re.search(r"cache: (\d+) of (\d+) sequences", ok("cache", DATA, store))
    assert found is not None
    left, of = map(int, found.groups())
    assert left < of
    if groups == 1:  # of two groups the other one may have done all that was left
        assert left > 0
    assert segments(tmp_path / "store") == segments(single / "store")
    assert content(tmp_path / "data/features") == content(single / "data/features")


@pytest.fixture(scope="module")
def uninterrupted(single: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by two workers that nobody killed."""
    folder = copy_of(single, tmp_path_factory.mktemp("uninterrupted"))
    command = Command(folder, "train", *TRAIN, "trainer.launcher=torchrun --standalone --nproc-per-node=2")
    status, said = command.end()
    assert status == 0, said
    return folder


@pytest.mark.parametrize("groups", [1, 2])
def test_workers_started_again_change_nothing(single: Path, uninterrupted: Path, tmp_path: Path, groups: int) -> None:
    """Bit for bit: the workers that come after take the newest checkpoint and go on from there."""
    folder = copy_of(single, tmp_path)
    restarts = "--max-restarts=2"
    launcher = f"torchrun --standalone --nproc-per-node=2 {restarts}"
    launcher = launcher if groups == 1 else two_groups(folder, restarts)
    command = Command(folder, "train", *TRAIN, f"trainer.launcher={launcher}")
    command.kill_a_worker(lambda: len(list(folder.glob("checkpoints/*/global_step_*"))) > 1)
    status, said = command.end()
    assert status == 0, said
    resumed = re.search(r"resuming at step (\d+) of 150", said)
    assert resumed is not None, said
    assert int(resumed[1]) >= 10
    assert content(folder / common.MODEL) == content(uninterrupted / common.MODEL)
    for split in CURVES:
        assert curve(folder, split) == curve(uninterrupted, split)

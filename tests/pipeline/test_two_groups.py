"""Two groups of workers that meet by torchrun's rendezvous make what one worker makes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from spec import files
from tests.pipeline.groups import curve, two_groups
from tests.stages.workspace import content, copy_of, ok, prepare, run_through

TRAIN = ("trainer.test_freq=3", "trainer.total_epochs=4")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which one worker, this process, has done everything up to train."""
    root = prepare(tmp_path_factory.mktemp("single"))
    run_through(root, "train", *TRAIN)
    return root


def close(one: list[list[float]], other: list[list[float]]) -> bool:
    """Equal but for the order in which workers' float32 sums are added."""
    return len(one) == len(other) and all(a == pytest.approx(b, rel=1e-3) for a, b in zip(one, other, strict=True))


def segments(store: Path) -> dict[str, str]:
    """Digests of all files of a store's segments; records hold no times."""
    return {
        str(path.relative_to(store)): files.digest_file(path)
        for path in store.rglob("*")
        if path.is_file() and path.parent.name != "roots" and not path.name.startswith(".")
    }


def test_two_groups_make_what_one_worker_makes(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_of(single, tmp_path)
    for name in ("responses", "features"):
        for path in (tmp_path / "data" / name).iterdir():
            path.unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    store = f"features.store={tmp_path}/store"
    for name, options in (("respond", ()), ("cache", ()), ("train", TRAIN)):
        ok(name, store, f"trainer.launcher={two_groups(tmp_path)}", *options)
    for name in ("responses", "features"):
        assert content(tmp_path / "data" / name) == content(single / "data" / name)
    assert segments(tmp_path / "store") == segments(single / "store")
    losses = curve(tmp_path, "train")
    assert losses[-1][1] < losses[0][1]
    assert close(losses, curve(single, "train"))
    assert close(curve(tmp_path, "val"), curve(single, "val"))

"""`spec store push` and `pull`: a second machine computes nothing that the first one has pushed."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("s3fs", reason="needs what `pip install '.[dev]'` installs")
pytest.importorskip("moto.server", reason="needs what `pip install '.[dev]'` installs")

from spec.store.manifest import Manifest
from spec.store.transfer import Place, Transfer
from stages import common
from tests import s3
from tests.stages.workspace import command, copy_of, inline_workers, ok
from tests.tiny import chain, store_features

URL = "s3://bucket/project"


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    with s3.server() as url, pytest.MonkeyPatch.context() as patch:
        s3.client(url).create_bucket(Bucket="bucket")
        s3.use(patch, url)
        yield


def test_a_second_machine_computes_nothing(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ready)
    said = command("store", "push", URL, "--dry-run")
    assert "would be copied to s3://bucket/project, 0 are there" in said
    assert Place(URL).collections() == []
    assert command("store", "push", URL).rstrip().endswith("segments are copied -> s3://bucket/project")
    assert "push: 0 segments (0 B) are to be copied" in command("store", "push", URL)

    monkeypatch.chdir(copy_of(ready, tmp_path / "second"))
    other = f"features.store={tmp_path / 'store'}"
    manifests = [part for split in ("train", "val") for part in ("--manifest", str(common.features_path(split)))]
    command("store", "pull", URL, *manifests, "-S", other)
    inline_workers(monkeypatch)
    ok("train", other, "trainer.total_epochs=1")
    assert list((tmp_path / "store").glob("answers-*")) == []
    command("store", "pull", URL, "-S", other)
    monkeypatch.setattr(common, "run_workers", lambda *_: pytest.fail("computed again"))
    assert "respond: 0 of" in ok("respond", other)
    assert "cache: 0 of" in ok("cache", other)


def test_what_a_manifest_needs(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its states, the tables, and the answers that it came from."""
    monkeypatch.chdir(ready)
    command("store", "push", str(tmp_path / "copy"), "--manifest", "data/features/val.json")
    manifest = Manifest.load(common.features_path("val"))
    place = Place(tmp_path / "copy")
    answers, states, tables = place.collections()
    assert place.segments(answers)
    assert {name: place.segments(name) for name in (states, tables)} == {
        name: sorted(segments) for name, segments in manifest.needed(Path()).items()
    }


def test_errors(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ready)
    assert "holds no store" in command("store", "pull", "s3://bucket/nothing", status=1)
    following = ("--follow", "--manifest", "data/features/val.json")
    assert "leave out --manifest" in command("store", "push", URL, *following, status=2)
    shutil.copytree("store", tmp_path / "store")
    manifest = Manifest.load(common.features_path("val"))
    name = manifest.last.segments[0]
    (manifest.last.collection(tmp_path / "store").folder / name / "ids/c/0").write_bytes(b"")
    said = command("store", "push", str(tmp_path / "copy"), "-S", f"features.store={tmp_path / 'store'}", status=1)
    assert f"segment {name} in {tmp_path}/store" in said
    assert "push: 1 problems are named above; everything else is copied. `spec store verify` sets" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_follow_ends_when_it_is_told_to(ready: Path, tmp_path: Path, number: signal.Signals) -> None:
    """It has copied what was there when the signal came."""
    url, root = f"s3://bucket/{number.name}", tmp_path / "store"
    following = [sys.executable, "-m", "stages.cli", "store", "push", url, "--follow", "-S", f"features.store={root}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(following, cwd=ready, env=common.child_environment(), text=True, **pipes) as process:
        assert "0 segments (0 B) are to be copied" in process.stdout.readline()
        while not (root / ".in-use").exists():
            assert process.poll() is None
        made = store_features(root, chain(24, 997))
        while not Place(url).collections():  # so it has begun
            assert process.poll() is None
        process.send_signal(number)
        assert f"{len(made.last.segments)} segments are copied -> {url}" in process.stdout.read()
    assert process.returncode == 0
    assert Transfer(Place(root), Place(url)).look() == []

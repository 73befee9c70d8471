"""The pipeline with its store on S3: it makes what it makes with a folder, and a second machine only downloads."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("boto3", reason="needs what `pip install '.[dev]'` installs")
pytest.importorskip("moto.server", reason="needs what `pip install '.[dev]'` installs")

from spec.store import codecs, remote
from spec.store.manifest import Manifest
from stages import cli, common
from tests import s3
from tests.stages.workspace import content, inline_workers, ok, prepare, refused

BEFORE = ("fetch", "tokenize")
STAGES = ("respond", "cache", "train")
BUCKET, UPKEEP, OTHERS = (f"features.store=s3://bucket/{name}" for name in ("project", "upkeep", "others"))
MEASURED = ("time", "positions_per_second", "data_wait", "memory_gb")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3.server() as url:
        s3.client(url).create_bucket(Bucket="bucket")
        yield url


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parameters and tokens."""
    root = prepare(tmp_path_factory.mktemp("s3"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in BEFORE:
            ok(name)
    return root


class Machines:
    """Workspaces of different machines."""

    def __init__(self, ready: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._ready, self._folder, self._patch = ready, folder, patch

    def enter(self, name: str) -> Path:
        """A workspace with tokens, on a machine with caches of its own."""
        root = self._folder / name
        root.mkdir()
        shutil.copy(self._ready / "params.yaml", root)
        shutil.copytree(self._ready / "data", root / "data")
        self._patch.setenv("XDG_CACHE_HOME", str(self._folder / f"cache-{name}"))
        self._patch.chdir(root)
        return root


@pytest.fixture
def machines(ready: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    s3.use(monkeypatch, server)
    inline_workers(monkeypatch)
    return Machines(ready, tmp_path, monkeypatch)


def made(root: Path) -> tuple[list[str], list[list[str]], bytes]:
    """Feature digests, loss curves and heads of a workspace."""
    digests = [Manifest.load(root / common.features_path(split)).digest for split in common.SPLITS]
    curves = []
    for name in ("train.csv", "val.csv"):
        with (root / "results/train" / name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows
        curves += [[value for key, value in row.items() if key not in MEASURED] for row in rows]
    return digests, curves, (root / common.MODEL / "pytorch_model.bin").read_bytes()


def store(command: str, *options: str) -> str:
    """Run a command that looks after the store; what it said."""
    result = CliRunner().invoke(cli.main, ["store", command, *options, "-S", UPKEEP])
    assert result.exit_code == 0, (result.output, result.exc_info)
    return result.output


def test_a_store_on_s3_changes_nothing(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    here = machines.enter("local")
    for name in STAGES:
        ok(name)
    there = machines.enter("first")
    for name in STAGES:
        ok(name, BUCKET)
    assert made(there) == made(here)
    assert content(there / "data") == content(here / "data")

    second = machines.enter("second")
    with monkeypatch.context() as patch:
        patch.setattr(common, "run_workers", lambda *_: pytest.fail("computed again"))
        assert "respond: 0 of" in ok("respond", BUCKET)
        assert "cache: 0 of" in ok("cache", BUCKET)
    ok("train", BUCKET)
    assert made(second) == made(here)

    machines.enter("third")  # dvc pull brings manifests, not the store
    shutil.copytree(there / "data", "data", dirs_exist_ok=True)
    ok("train", BUCKET)
    assert made(Path.cwd()) == made(here)
    ok("evaluate", BUCKET)


def test_what_could_not_be_uploaded_gives_way_to_the_buckets(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine has uploaded the same rows with other bits meanwhile: manifests name the bucket's."""
    machines.enter("uploaded")
    for name in ("respond", "cache"):
        ok(name, OTHERS)
    there = Path.cwd()
    machines.enter("offline")
    here = f"features.store={remote.local_folder('s3://bucket/others')}"
    with monkeypatch.context() as patch:
        encode = codecs.encode
        patch.setattr(codecs, "encode", lambda states, encoding: encode(states + 1, encoding))
        for name in ("respond", "cache"):
            ok(name, here)
    ok("cache", OTHERS)
    for split in common.SPLITS:
        path = common.features_path(split)
        assert Manifest.load(path).digests == Manifest.load(there / path).digests
    ok("train", OTHERS)


def test_looking_after_it(machines: Machines, ready: Path) -> None:
    machines.enter("a")
    for name in ("respond", "cache"):
        ok(name, UPKEEP)
    assert "s3://bucket/upkeep/features-" in store("info")
    said = store("info", "data/features/train.json")
    assert "in s3://bucket/upkeep" in said
    assert "0 missing or damaged" in said
    manifest = Manifest.load(common.features_path("train"))
    (name,) = manifest.segments[:1]
    states = manifest.collection(remote.local_folder("s3://bucket/upkeep")).folder / name / "states/c/0/0"
    content = states.read_bytes()
    states.write_bytes(content[:-1])
    said = store("info", "data/features/train.json")
    assert "1 missing or damaged" in said, "the bucket's copy is of no use while this one is here"
    assert f"MISSING: {name}" in said
    states.write_bytes(content)
    assert "are whole, 0 are not" in store("verify")
    assert "store s3://bucket/upkeep: 0 segments (0 B) removed" in store("gc", "--older-than", "0")

    machines.enter("b")
    said = store("forget", str(ready / "prompts/val.parquet"), "--yes")
    assert "16 stored rows of 8 given ones are gone" in said
    assert "respond: 8 of 40 answers are to be written" in ok("respond", UPKEEP)


def test_errors_come_before_any_work(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    machines.enter("a")
    monkeypatch.setattr(common, "run_workers", lambda *_: pytest.fail("worked"))
    assert "there is no such bucket" in refused("respond", "features.store=s3://nowhere")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert "is the network up" in refused("respond", BUCKET)

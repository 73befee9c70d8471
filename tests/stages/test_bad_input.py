"""Bad input stops a stage before any work, with a message that says what to do; nothing on disk is harmed."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.stages.workspace import ok, prepare, refused


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("ready"))


@pytest.fixture
def folder(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(ready / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_files=absent.parquet", "absent.parquet"),
        ("model.partial_pretrain=./nowhere", "no folder"),
        ("model.partial_pretrain=empty", "no weights"),
    ],
)
def test_what_fetch_does_not_find(folder: Path, ready: Path, override: str, message: str) -> None:
    shutil.copytree(ready / "base", folder / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    assert message in refused("fetch", override)
    assert not (folder / "data").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("respond.source=data", "answers are needed, but no column holds them"),
        ("data.prompt_key=prompt.text", "no column 'prompt.text', which data.prompt_key names"),
        ("data.max_length=32", "data.max_length is 32"),
    ],
)
def test_a_file_of_which_the_parameters_leave_nothing(folder: Path, override: str, message: str) -> None:
    pq.write_table(pa.table({"question": ["word " * 500]}), folder / "bad.parquet")
    ok("fetch", "data.train_files=bad.parquet")
    assert message in refused("tokenize", "data.train_files=bad.parquet", override)
    assert not (folder / "data/tokens/train.parquet").exists()


def test_no_space(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok("fetch")
    ok("tokenize")
    monkeypatch.setattr("spec.files.free_bytes", lambda path: 10)
    message = refused("respond")
    assert "free" in message
    assert "features.store" in message
    assert not (folder / "data/responses").exists()

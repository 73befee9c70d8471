"""Bad input stops a stage before any work, with a message that says what to do; nothing on disk is harmed."""

import shutil
from pathlib import Path
from typing import Any

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
        ("optim.lr=fast", "optim.lr"),
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
    ("columns", "overrides", "message"),
    [
        ({"question": []}, (), "no rows"),
        ({"colour": ["red"]}, (), "colour"),
        ({"question": ["a", None]}, (), "null"),
        ({"question": ["a"], "answer": [""]}, ("respond.source=data",), "answer"),
        ({"question": ["a"]}, ("respond.source=data",), "answer"),
        ({"question": ["a"]}, ("data.prompt_key=prompt.text",), "prompt"),
        ({"question": ["word " * 500]}, ("data.max_length=32",), "max_length"),
        (None, (), "parquet"),
    ],
)
def test_training_file(folder: Path, columns: dict[str, Any] | None, overrides: tuple[str, ...], message: str) -> None:
    path = folder / "bad.parquet"
    if columns is None:
        path.write_text("question,answer\n")
    else:
        pq.write_table(pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}), path)
    named = f"data.train_files={path}"
    ok("fetch", named)
    assert message in refused("tokenize", named, *overrides)
    assert not (folder / "data/tokens/train.parquet").exists()


def test_no_space(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok("fetch")
    ok("tokenize")
    monkeypatch.setattr("spec.files.free_bytes", lambda path: 10)
    message = refused("respond")
    assert "free" in message
    assert "features.store" in message
    assert not (folder / "data/responses").exists()

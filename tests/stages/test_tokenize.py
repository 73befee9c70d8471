"""Every layout goes from a parquet file through the tokenize stage, and all of them at once through the pipeline."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spec.store.manifest import Manifest
from stages import common
from tests.stages.workspace import command, ok, prepare, refused, run_through

TOOL = {"type": "function", "function": {"name": "weather"}}


def turns(question: str, *keys: str) -> list[dict[str, str]]:
    role, content, user, assistant = keys or ("role", "content", "user", "assistant")
    return [{role: user, content: question}, {role: assistant, content: "b"}]


LAYOUTS: dict[str, Any] = {  # columns for a question
    "messages": lambda q: {"messages": turns(q)},
    "sharegpt": lambda q: {"conversations": turns(q, "from", "value", "human", "gpt")},
    "json": lambda q: {"messages": json.dumps(turns(q))},
    "alpaca": lambda q: {"instruction": q, "input": "more", "output": "b"},
    "openorca": lambda q: {"system_prompt": "Be brief.", "question": q, "response": "b"},
    "trl": lambda q: {"prompt": turns(q)[:1], "completion": turns(q)[1:]},
    "preferences": lambda q: {"prompt": q, "chosen": turns(q), "rejected": turns(q)},
    "verl": lambda q: {"prompt": turns(q)[:1], "extra_info": {"answer": "b", "index": 0}},
    "tools": lambda q: {"messages": turns(q), "tools": json.dumps([TOOL])},
    "text": lambda q: {"text": q + " b"},
}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has run on files of all layouts; the template has a place for tools."""
    root = prepare(tmp_path_factory.mktemp("layouts"))
    template = root / "base/chat_template.jinja"
    tools = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    template.write_text(tools + template.read_text())
    for split in common.SPLITS:
        (root / split).mkdir()
        for name, columns in LAYOUTS.items():
            rows = [columns(f"{split} {i}") for i in range(2)]
            pq.write_table(pa.Table.from_pylist(rows), root / f"{split}/{name}.parquet")
    run_through(root, "evaluate", *(f"data.{split}_files={root / split}" for split in common.SPLITS))
    return root


def test_all_of_them_are_evaluated(ready: Path) -> None:
    assert set(Manifest.load(ready / "data/features/eval.json").domains) == set(LAYOUTS)
    assert (ready / "results/evaluate/details.json").is_file()


@pytest.fixture
def folder(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text((ready / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, *questions: str | None) -> str:
    pq.write_table(pa.table({"question": questions}), path)
    return str(path)


def test_bad_rows_are_left_out_where_they_may_be(folder: Path) -> None:
    named = f"data.train_files={write(folder / 'x.parquet', 'a', None)}"
    ok("fetch", named)
    assert "1 of 2 rows cannot be used" in refused("tokenize", named)
    assert not list((folder / "data/tokens").iterdir())
    assert "1 bad rows left out: 1 x column question is null" in ok("tokenize", named, "data.skip_bad_rows=true")


def test_splits_share_no_file_and_what_prompts_they_share_is_said(folder: Path) -> None:
    train, val = (f"data.{split}_files={write(folder / f'{split}.parquet', 'a', split)}" for split in ("train", "val"))
    ok("fetch", train, val)
    assert "tokenize val: 1 prompts are in train too" in ok("tokenize", train, val)
    write(folder / "val.parquet", "a", "train")
    assert "are the same file, in data.train_files and in data.val_files" in refused("fetch", train, val)


def test_limits_are_those_of_the_base(folder: Path) -> None:
    named = f"data.train_files={write(folder / 'x.parquet', 'a', 'b ' * 600)}"
    ok("fetch", named)
    assert "1 rows dropped: longer than the base has positions" in ok("tokenize", named, "data.max_length=4096")


def test_inspect_shows_how_data_is_read(ready: Path, folder: Path) -> None:
    output = command("inspect", str(ready / "train"))
    assert "10 files with 20 rows; looked at 20" in output
    assert "alpaca.parquet: prompts in instruction and input, answers in output" in output
    assert "turns by role: user 18, assistant 18, system 2; 2 to 3 turns a conversation" in output
    assert "user\ntrain 0\n\nmore<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]" in output
    assert "bad row: " in command("inspect", write(folder / "x.parquet", "a", None))
    pq.write_table(pa.table({"question": ["a"], "history": ["b"]}), folder / "y.parquet")
    said = command("inspect", "y.parquet", status=1)
    assert "Error: y.parquet, row 0: column history looks like a part of the prompt" in said
    assert not (folder / "data").exists()

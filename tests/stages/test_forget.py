"""`spec store forget` says what it has not found, and which checkpoints hold what it removed."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spec import corpus, lookup
from tests.stages.workspace import command, ok, prepare, run_through


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = prepare(tmp_path_factory.mktemp("forget"))
    run_through(root, "cache")
    return root


@pytest.fixture(autouse=True)
def table(ready: Path, monkeypatch: pytest.MonkeyPatch) -> pa.Table:
    monkeypatch.chdir(ready)
    return pq.read_table("prompts/train.parquet")


def forget(rows: pa.Table, path: Path, status: int = 0) -> str:
    pq.write_table(rows, path / "rows.parquet")
    return command("store", "forget", "--yes", str(path / "rows.parquet"), status=status)


def test_rows_that_are_not_found_are_an_error(table: pa.Table, tmp_path: Path) -> None:
    said = forget(table.slice(0, 2), tmp_path)
    assert "4 stored rows of 2 given ones are gone" in said  # an answer and a sequence of states each
    said = forget(table.slice(1, 3), tmp_path, status=1)  # the first of them is gone already
    assert "4 stored rows of 3 given ones are gone" in said
    assert "1 of the 3 given rows were not found in" in said
    assert "with data.date" in said


def test_a_row_that_cannot_be_read_is_an_error(table: pa.Table, tmp_path: Path) -> None:
    said = forget(pa.table({"prompt": [table["question"][8].as_py(), None]}), tmp_path, status=1)
    assert "rows.parquet, row 1: column prompt is null. Nothing was removed" in said
    assert "are gone" not in said


def test_checkpoints_that_draft_by_forgotten_answers_are_named(table: pa.Table, tmp_path: Path) -> None:
    rows = corpus.read("data/responses/train.parquet")
    answers = [answer for row in rows for answer in lookup.answers(row.ids, row.mask)]
    for folder, held, known in (("", answers, True), ("last", answers[:10] + answers[11:], True), ("old", [], False)):
        path = Path("models/speculator") / folder / lookup.FILE
        digest = lookup.write(path, held, 1)
        (path.parent / "config.json").write_text(json.dumps({"lookup": digest if known else "another"}))
    for status in (0, 1):  # the second time they are gone from the store, but data/responses holds them
        said = forget(table.slice(10, 1), tmp_path, status)
        assert "models/speculator/lookup.npy holds answers to these rows: " in said
        assert "models/speculator/last" not in said
        assert "models/speculator/old/lookup.npy may hold answers to these rows: " in said
    Path("data/responses/train.parquet").unlink()
    assert "models/speculator/lookup.npy holds answers to these rows: " in forget(table.slice(12, 1), tmp_path)


def test_rows_are_found_after_a_change_of_template(table: pa.Table, tmp_path: Path) -> None:
    Path("base/chat_template.jinja").write_text("{{ raise_exception('no rows any more') }}")
    ok("fetch")
    said = forget(table.slice(5, 2), tmp_path)
    assert "4 stored rows of 2 given ones are gone" in said
    assert "2 of the given rows are in the store's index" in said

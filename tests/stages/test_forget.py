"""`spec store forget` says what it has not found."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from stages import cli
from tests.stages.workspace import ok, prepare, run_through


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
    done = CliRunner().invoke(cli.main, ["store", "forget", "--yes", str(path / "rows.parquet")])
    assert done.exit_code == status, done.output
    return done.output


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


def test_rows_are_found_after_a_change_of_template(table: pa.Table, tmp_path: Path) -> None:
    Path("base/chat_template.jinja").write_text("{{ raise_exception('no rows any more') }}")
    ok("fetch")
    said = forget(table.slice(5, 2), tmp_path)
    assert "4 stored rows of 2 given ones are gone" in said
    assert "2 of the given rows are in the store's index" in said

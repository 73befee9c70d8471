"""`spec store forget` says what it has not found."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from stages import cli
from tests.stages.workspace import inline_workers, prepare, run_through


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = prepare(tmp_path_factory.mktemp("forget"))
    run_through(root, "cache")
    return root


def forget(*rows: Path) -> Result:
    return CliRunner().invoke(cli.main, ["store", "forget", "--yes", *map(str, rows)])


def test_rows_that_are_not_found_are_an_error(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ready)
    inline_workers(monkeypatch)
    table = pq.read_table("prompts/train.parquet")
    pq.write_table(table.slice(0, 2), tmp_path / "stored.parquet")
    done = forget(tmp_path / "stored.parquet")
    assert done.exit_code == 0, done.output
    assert "4 stored rows of 2 given ones are gone" in done.output  # an answer and a sequence of states each

    pq.write_table(table.slice(1, 3), tmp_path / "more.parquet")  # the first of them is gone already
    done = forget(tmp_path / "more.parquet")
    assert done.exit_code == 1
    assert "4 stored rows of 3 given ones are gone" in done.output
    assert "1 of the 3 given rows were not found in" in done.output
    assert "with data.date" in done.output


def test_a_row_that_cannot_be_read_is_an_error(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ready)
    prompts = [pq.read_table("prompts/train.parquet")["question"][8].as_py(), None]
    pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string())}), tmp_path / "rows.parquet")
    done = forget(tmp_path / "rows.parquet")
    assert done.exit_code == 1
    assert "rows.parquet, row 1: column prompt is null. Nothing was removed" in done.output
    assert "are gone" not in done.output


def test_rows_are_found_after_a_change_of_template(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ready)
    pq.write_table(pq.read_table("prompts/train.parquet").slice(5, 2), tmp_path / "rows.parquet")
    (ready / "base" / "chat_template.jinja").write_text("{{ raise_exception('no rows any more') }}")
    fetched = CliRunner().invoke(cli.main, ["fetch"])
    assert fetched.exit_code == 0, fetched.output
    done = forget(tmp_path / "rows.parquet")
    assert done.exit_code == 0, done.output
    assert "4 stored rows of 2 given ones are gone" in done.output
    assert "2 of the given rows are in the store's index" in done.output

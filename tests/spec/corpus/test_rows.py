"""Rows that cannot be used."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spec.corpus import CorpusError

from .families import assistant, run, save, user

BE, QUESTION, NEEDED = {"role": "system", "content": "a"}, {"question": "a"}, {"need_answers": True}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, r"x.parquet: the file has no rows"),
        ([{"id": 1}], {}, r"no layout fits its columns: found id \(int64\).*messages.*question.*text"),
        ([{"messages": [1]}], {}, r"no layout fits its columns: found messages \(list"),
        ([{"text": "a", "r": "b"}], {"response_key": "r"}, r"no layout fits.*data.prompt_key"),
        ([{"q": "a"}], {"prompt_key": "p"}, r"no column 'p', which data.prompt_key names: found q \(string\)"),
        ([{"q": {"a": "b"}}], {"prompt_key": "q.b"}, r"no column 'q.b', which data.prompt_key names: found q \(struct"),
        ([{"question": "a"}], {"response_key": "r"}, r"no column 'r', which data.response_key names"),
        ([{"q": 1}], {"prompt_key": "q"}, r"column 'q', which data.prompt_key names, is int64; expected a string, a"),
        ([{"question": "a", "answer": 1}], {"response_key": "answer"}, r"is int64; expected a string, a list of st"),
        ([{"question": "a"}], {"need_answers": True}, r"answers are needed, but no column.*respond.source=base"),
        ([{"question": "a"}, {"question": None}], {}, r"x.parquet, row 1: column question is null"),
        ([{"extra_info": None}, {"extra_info": {"q": "a"}}], {"prompt_key": "extra_info.q"}, r"row 0: column extra_i"),
        ([{"text": "a b"}, {"text": None}], {}, r"x.parquet, row 1: column text is null"),
        ([{"messages": None}, {"messages": [user("a")]}], {}, r"row 0: column messages is null"),
        ([{"messages": [user(" ")]}, {"messages": [user("a")]}], {}, r"row 0: the prompt in column messages is empty"),
        ([{"turns": ["a", "b"]}], {}, r"row 0: column turns holds 2 texts without their speakers; expected {role"),
        ([{"messages": [user("a")]}, {"messages": []}], {}, r"row 1: column messages has no messages"),
        ([{"messages": "a"}], {}, r"row 0: column messages holds text that is not the JSON of a list of turns"),
        ([{"prompt": "[{'role': 'user', 'content': 'a'}]"}], {}, r"looks like a list of turns and is not JSON"),
        ([{"messages": [{"role": None, "content": "a"}, user("")]}], {}, r"row 0: a turn of .* has the role None"),
        ([{"messages": [{"role": "narrator", "content": "a"}]}], {}, r"row 0: .* the role 'narrator'; expected user,"),
        ([{"messages": [user([{"type": "image", "text": "a"}])]}], {}, r"row 0: .* a part of type image in its cont"),
        ([{"question": "a", "tools": "no JSON"}], {}, r"row 0: column tools is neither a list of tools nor JSON"),
        ([{"prompt": [user("a")], "chosen": [user("b"), assistant("c")]}], {}, r"chosen .* does not begin with prompt"),
        ([{"messages": [BE, user("b")], "system": "c"}], {}, r"messages begins with a system turn.*data.ignore_c"),
        ([{"messages": [assistant("a"), user("b")]}], {}, r"row 0: column messages starts with an assistant turn"),
        ([{"prompt": [user("a"), assistant("b")], "answer": "c"}], {}, r"row 0: column prompt ends with an assistant"),
        ([{**QUESTION, "answer": "b"}, {**QUESTION, "answer": None}], NEEDED, r"row 1: the answer in answer is null"),
        ([{**QUESTION, "answer": " \n"}], NEEDED, r"row 0: the answer in answer is null or empty; respond.source=base"),
        ([{**QUESTION, "answer": ["b"]}, {**QUESTION, "answer": []}], NEEDED, r"row 1: the answer in answer is null"),
        ([{"messages": [user("a"), {**assistant("b"), "weight": 0}]}], NEEDED, r"answer in messages is of weight 0"),
        ([{"messages": [user("a"), assistant("")]}], NEEDED, r"row 0: the answer in messages is null"),
        ([{"messages": [user("a")]}], NEEDED, r"row 0: no answer follows the prompt"),
        ([QUESTION], {"max_length": 4}, r"no row of .*x.parquet can be used \(1 read\): the shortest needs \d+"),
        ([{"text": ""}], {}, r"no row of .* can be used \(1 read\): all are empty"),
    ],
)
def test_bad_rows(tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], message: str) -> None:
    schema = None if rows else pa.schema([("question", pa.string())])
    with pytest.raises(CorpusError, match=message):
        run(save(tmp_path / "x.parquet", rows, schema), **options)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([pa.array(["a"])] * 2, names=["question"] * 2), tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match=r"x.parquet: two columns have the same name: found question"):
        run(tmp_path / "x.parquet")


def test_columns_are_checked_in_every_file_before_any_row_is_read(tmp_path: Path) -> None:
    files = [save(tmp_path / "a.parquet", [{"question": None}]), save(tmp_path / "b.parquet", [{"id": 1}])]
    with pytest.raises(CorpusError, match=r"b.parquet: no layout fits"):
        run(files)


def test_a_file_that_git_lfs_has_not_fetched_is_told_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(CorpusError, match=r"x.parquet: not a readable parquet file"):
        run(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n")
    with pytest.raises(CorpusError, match=r"x.parquet: .* \(a pointer of Git LFS.*git lfs pull"):
        run(path)


def test_all_bad_rows_are_counted_and_the_first_named_before_anything_is_written(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"question": "a", "answer": "b"}, {"question": None, "answer": "b"}] * 600
    path = save(tmp_path / "x.parquet", [*rows, {"question": "a", "answer": ""}])
    with pytest.raises(CorpusError) as error:
        run(path, need_answers=True)
    assert "601 of 1,201 rows cannot be used: 600 x column question is null; 1 x the answer in" in str(error.value)
    assert [line for line in str(error.value).split("\n") if "row 9: column question is null" in line]
    assert "row 11" not in str(error.value)
    assert "data.skip_bad_rows=true leaves such rows out" in str(error.value)
    sequences, report = run(path, need_answers=True, skip_bad_rows=True)
    assert (len(sequences), report.rows, report.kept) == (600, 1201, 600)
    assert any(line.startswith("601 bad rows left out: 600 x column question is null") for line in report.lines())


def test_where_every_row_is_bad_nothing_is_skipped(tmp_path: Path) -> None:
    path = save(tmp_path / "x.parquet", [{"messages": [user("a"), {"role": "narrator", "content": "b"}]}] * 3)
    with pytest.raises(CorpusError, match=r"3 of 3 rows cannot be used: 3 x .* the role 'narrator'"):
        run(path, skip_bad_rows=True)


def test_invalid_utf8_is_a_bad_row(tmp_path: Path) -> None:
    text = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"], pa.binary()).buffers())
    pq.write_table(pa.table({"question": text, "answer": ["x", "y", "z"]}), tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match=r"x.parquet, row 1: column question is not valid UTF-8"):
        run(tmp_path / "x.parquet")
    assert len(run(tmp_path / "x.parquet", skip_bad_rows=True)[0]) == 2

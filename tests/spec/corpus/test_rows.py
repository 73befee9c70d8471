"""Rows that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from spec import corpus
from spec.corpus import CorpusError

from .families import (
    assistant,
    run,
    save,
    sentencepiece_like,
    user,
)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, r"x.parquet: the file has no rows"),
        ([{"id": 1}], {}, r"no layout fits its columns: found id \(int64\).*messages.*question.*text"),
        ([{"messages": ["a"]}], {}, r"no layout fits its columns: found messages \(list"),
        ([{"text": "a", "r": "b"}], {"response_key": "r"}, r"no layout fits.*data.prompt_key"),
        ([{"q": "a"}], {"prompt_key": "p"}, r"no column 'p', which data.prompt_key names: found q \(string\)"),
        ([{"q": {"a": "b"}}], {"prompt_key": "q.b"}, r"no column 'q.b', which data.prompt_key names: found q \(struct"),
        ([{"question": "a"}], {"response_key": "r"}, r"no column 'r', which data.response_key names"),
        ([{"q": 1}], {"prompt_key": "q"}, r"column 'q', which data.prompt_key names, is int64; expected a string or"),
        ([{"question": "a", "answer": 1}], {"response_key": "answer"}, r"is int64; expected a string, a list of st"),
        ([{"question": "a"}], {"need_answers": True}, r"answers are needed, but no column.*respond.source=base"),
        ([{"question": "a"}, {"question": None}], {}, r"x.parquet, row 1: column question is null"),
        ([{"question": None}], {}, r"x.parquet, row 0: column question is null"),
        ([{"extra_info": None}, {"extra_info": {"q": "a"}}], {"prompt_key": "extra_info.q"}, r"row 0: column extra_i"),
        ([{"text": "a b"}, {"text": None}], {}, r"x.parquet, row 1: column text is null"),
        ([{"messages": None}, {"messages": [user("a")]}], {}, r"row 0: column messages is null"),
        ([{"messages": [user("a")]}, {"messages": []}], {}, r"row 1: column messages has no messages"),
        ([{"messages": "a"}], {}, r"row 0: column messages holds text that is not the JSON of a list of turns"),
        ([{"prompt": "[{'role': 'user', 'content': 'a'}]"}], {}, r"looks like a list of turns and is not JSON"),
        ([{"messages": [{"role": None, "content": "a"}, user("")]}], {}, r"row 0: a turn of .* has the role None"),
        ([{"messages": [{"role": "narrator", "content": "a"}]}], {}, r"row 0: .* the role 'narrator'; expected user,"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image", "text": "a"}]}]}],
            {},
            r"row 0: .* has a part of type image in its content; only text",
        ),
        ([{"question": "a", "tools": "no JSON"}], {}, r"row 0: column tools is neither a list of tools nor JSON"),
        (
            [{"prompt": [user("a")], "chosen": [user("b"), assistant("c")]}],
            {},
            r"row 0: column chosen holds a conversation that does not begin with prompt",
        ),
        (
            [{"messages": [{"role": "system", "content": "a"}, user("b")], "system": "c"}],
            {},
            r"row 0: column messages begins with a system turn, and system holds another.*data.ignore_columns",
        ),
        ([{"messages": [assistant("a"), user("b")]}], {}, r"row 0: column messages starts with an assistant turn"),
        ([{"prompt": [user("a"), assistant("b")], "answer": "c"}], {}, r"row 0: column prompt ends with an assistant"),
        (
            [{"question": "a", "answer": "b"}, {"question": "a", "answer": None}],
            {"need_answers": True},
            r"row 1: the answer in answer is null or empty",
        ),
        (
            [{"question": "a", "answer": " \n"}],
            {"need_answers": True},
            r"x.parquet, row 0: the answer in answer is null or empty; respond.source=base",
        ),
        (
            [{"question": "a", "answer": ["b"]}, {"question": "a", "answer": []}],
            {"need_answers": True},
            r"row 1: the answer in answer is null",
        ),
        ([{"messages": [user("a"), assistant("")]}], {"need_answers": True}, r"row 0: the answer in messages is null"),
        ([{"messages": [user("a")]}], {"need_answers": True}, r"row 0: no answer follows the prompt"),
        (
            [{"question": "a b"}],
            {"max_length": 4},
            r"no row of .*x.parquet can be used \(1 read\): the shortest needs \d+",
        ),
        ([{"text": ""}], {}, r"no row of .* can be used \(1 read\): all are empty"),
    ],
)
def test_bad_rows(tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], message: str) -> None:
    schema = None if rows else pa.schema([("question", pa.string())])
    with pytest.raises(CorpusError, match=message):
        run(save(tmp_path / "x.parquet", rows, schema), **options)


def test_columns_are_checked_in_every_file_before_any_row_is_read(tmp_path: Path) -> None:
    files = [save(tmp_path / "a.parquet", [{"question": None}]), save(tmp_path / "b.parquet", [{"id": 1}])]
    with pytest.raises(CorpusError, match=r"b.parquet: no layout fits"):
        run(files)


def test_the_templates_own_error_comes_with_file_and_row(tmp_path: Path) -> None:
    good, bad = [user("a"), assistant("b")], [user("a"), user("b"), assistant("c")]
    path = save(tmp_path / "m.parquet", [{"messages": good}, {"messages": bad}])
    with pytest.raises(CorpusError, match=r"m.parquet, row 1: the chat template refuses .* must alternate"):
        run(path, sentencepiece_like())


@pytest.mark.parametrize("content", [b"", b"PAR1 not really", b'{"question": "a"}\n'])
def test_files_that_are_not_parquet(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"x.parquet: not a readable parquet file"):
        run(path)
    with pytest.raises(CorpusError, match=r"x.parquet: not a readable parquet file"):
        corpus.read(path)

"""Limits, counts and the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from spec import corpus
from spec.corpus import CorpusError

from .families import (
    FORCED_THINK,
    assistant,
    byte_level,
    run,
    save,
    serving,
    user,
)


def test_the_report_counts_what_was_kept(tmp_path: Path) -> None:
    tokenizer = byte_level()
    rows = [{"question": "a", "answer": "b", "domain": "x"}, {"question": "a", "answer": "bb" * 50, "domain": "y"}]
    done: list[int] = []
    sequences, report = run(
        save(tmp_path / "q.parquet", rows * 150), tokenizer, max_length=70, need_answers=True, progress=done.append
    )
    assert len(sequences) == 150
    assert (report.rows, report.kept, report.too_long, report.unanswered) == (300, 150, 150, 0)
    assert report.tokens == sum(map(len, sequences))
    assert report.supervised == sum(int(s.mask.sum()) for s in sequences)
    assert report.domains == {"x": 150}
    assert report.end_of_turn == "<|im_end|>"
    assert report.lines()[0] == f"{tmp_path / 'q.parquet'}: prompts in question, answers in answer, domain from domain"
    assert "150 rows dropped: longer than max_length" in report.lines()
    assert report.lines()[-1].startswith("150 of 300 rows kept")
    assert done == [256, 44]


def test_limits_are_exact(tmp_path: Path) -> None:
    tokenizer = byte_level()
    path = save(tmp_path / "q.parquet", [{"question": "a", "answer": "b"}])
    (sequence,), _ = run(path, tokenizer)
    prompt, total = sequence.prompt_length, len(sequence)
    assert len(run(path, tokenizer, max_length=total, need_answers=True)[0][0]) == total
    with pytest.raises(CorpusError, match=rf"needs {total} tokens, data.max_length is {total - 1}"):
        run(path, tokenizer, max_length=total - 1, need_answers=True)
    # The base writes the answer: the row stays as long as its prompt leaves room for one token.
    (short,), report = run(path, tokenizer, max_length=total - 1)
    assert len(short) == short.prompt_length == prompt
    assert (report.shortened, report.unanswered) == (1, 0)
    assert prompt + 1 == total - 1
    with pytest.raises(CorpusError, match="no row of"):
        run(path, tokenizer, max_length=prompt)


def test_max_samples_takes_the_first_rows_of_all_files(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{n}.parquet", [{"question": "a"}] * 3) for n in "ab"]
    sequences, report = run(files, max_samples=4)
    assert [s.domain for s in sequences] == ["a", "a", "a", "b"]
    assert report.rows == 4
    sources = corpus.inspect(files, prompt_key=None, response_key=None, need_answers=False)
    assert (corpus.count_rows(sources, 4), corpus.count_rows(sources, None)) == (4, 6)


def test_a_template_with_no_place_for_ready_answers_still_serves_prompts(tmp_path: Path) -> None:
    path = save(tmp_path / "q.parquet", [{"question": "a", "answer": "b"}])
    tokenizer = byte_level(FORCED_THINK)
    (sequence,), report = run(path, tokenizer)
    assert sequence.ids.tolist() == serving(tokenizer, [user("a")])
    assert report.shortened == 1
    with pytest.raises(CorpusError, match=r"q.parquet, row 0: the chat template does not render assistant message 1"):
        run(path, tokenizer, need_answers=True)
    several = save(tmp_path / "m.parquet", [{"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}])
    (sequence,), report = run(several, tokenizer)
    assert (report.unplaced, report.shortened, int(sequence.mask.sum())) == (1, 1, 0)
    assert any(line.startswith("1 earlier assistant turns not supervised") for line in report.lines())

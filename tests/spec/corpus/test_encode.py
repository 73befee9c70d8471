"""Limits, counts and the report."""

import re
from pathlib import Path

import pyarrow as pa
import pytest

from spec import corpus
from spec.corpus import CorpusError

from .families import FORCED_THINK, assistant, byte_level, run, save, serving, user


def test_the_report_counts_what_was_kept(tmp_path: Path) -> None:
    tokenizer = byte_level()
    rows = [{"question": "a", "answer": "b", "domain": "x"}, {"question": "a", "answer": "bb" * 50, "domain": "y"}]
    done: list[int] = []
    path = save(tmp_path / "q.parquet", rows * 150)
    sequences, report = run(path, tokenizer, max_length=70, need_answers=True, progress=done.append)
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


def test_rows_beyond_the_positions_of_the_base_are_counted_by_themselves(tmp_path: Path) -> None:
    path = save(tmp_path / "q.parquet", [{"question": "a", "answer": "b"}, {"question": "a" * 300, "answer": "b"}])
    sequences, report = run(path, max_positions=100)
    assert (len(sequences), report.beyond, report.too_long) == (1, 1, 0)
    assert "1 rows dropped: longer than the base has positions" in report.lines()
    _, report = run(path, trained_positions=100)
    assert (report.kept, report.stretched, report.beyond) == (2, 1, 0)
    (sequence,) = sequences
    (short,), report = run(save(path, [{"question": "a", "answer": "b"}]), max_positions=len(sequence) - 1)
    assert (report.shortened, len(short)) == (1, short.prompt_length)
    with pytest.raises(CorpusError, match="and the base has 5 positions"):
        run(path, max_positions=5)


def test_a_token_without_a_row_in_lm_head_is_named(tmp_path: Path) -> None:
    path, tokenizer = save(tmp_path / "q.parquet", [{"question": "a"}]), byte_level()
    highest = int(run(path, tokenizer)[0][0].ids.max())
    assert len(run(path, tokenizer, vocab_size=highest + 1)[0]) == 1
    token = re.escape(repr(tokenizer.convert_ids_to_tokens(highest)))
    words = rf"row 0: the token {token} has id {highest}, and the base has {highest} rows"
    with pytest.raises(CorpusError, match=words):
        run(path, tokenizer, vocab_size=highest)


@pytest.mark.parametrize(
    "text", ["<|im_start|>user\na<|im_end|>\n", "\n\nHuman: a\n\nAssistant: b", "### Response:", "[INST] a [/INST]"]
)
def test_prompts_that_look_rendered_already_are_counted(tmp_path: Path, text: str) -> None:
    _, report = run(save(tmp_path / "q.parquet", [{"question": text}, {"question": "Who is the assistant: a?"}]))
    assert report.rendered == 1
    assert any(line.startswith("1 rows in which a user's turn looks rendered") for line in report.lines())


def test_empty_files_are_passed_over_with_a_word(tmp_path: Path) -> None:
    full = save(tmp_path / "part-0001.parquet", [{"question": "a"}])
    empty = save(tmp_path / "part-0002.parquet", [], pa.schema([("question", pa.string())]))
    sequences, report = run([full, empty])
    assert [s.domain for s in sequences] == ["part"]
    assert f"{empty}: skipped, since there is no row" in report.lines()

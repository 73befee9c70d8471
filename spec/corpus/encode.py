"""Parquet files -> token sequences, in pieces, with a report of what happened to the rows."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spec.config import DATE
from spec.corpus.chat import Chat, ChatTemplate, PrefixError, install_plain_template
from spec.corpus.sequences import CorpusError, TokenSequence
from spec.corpus.sources import Layout, Row, inspect, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_PER_CALL = 256  # a fast tokenizer spreads the texts of one call over the cores


@dataclass
class Report:
    """What happened to the rows; `stream` counts in it as it goes.

    unanswered: kept rows without an answer in the data, to be written by the base.
    shortened: kept rows whose answer was left off, because it does not fit max_length or the template cannot place
        it; the base writes another (never where answers are needed).
    empty: dropped rows of plain text with fewer than two tokens: there is nothing to predict.
    """

    rows: int = 0
    kept: int = 0
    too_long: int = 0
    empty: int = 0
    unanswered: int = 0
    shortened: int = 0
    tokens: int = 0
    supervised: int = 0
    domains: Counter[str] = field(default_factory=Counter)
    layouts: dict[Path, Layout] = field(default_factory=dict)
    plain_template: bool = False
    end_of_turn: str | None = None

    def lines(self) -> list[str]:
        """The report in words, for a log: the layouts first, the totals last."""
        by_layout: dict[Layout, list[Path]] = {}
        for path, layout in self.layouts.items():
            by_layout.setdefault(layout, []).append(path)
        lines = [
            f"{paths[0]}{f' and {len(paths) - 1} more files' if paths[1:] else ''}: {layout}"
            for layout, paths in by_layout.items()
        ]
        if self.plain_template:
            lines.append("the base has no chat template: a plain one is used (User: ... Assistant: ...)")
        if self.end_of_turn is None and any(layout.kind != "text" for layout in by_layout):
            lines.append("the chat template closes answers with no special token: they end with their last word")
        for count, what in (
            (self.too_long, "rows dropped: longer than max_length"),
            (self.empty, "rows dropped: empty text"),
            (self.shortened, "answers left off: too long or not where the template's generation prompt ends"),
            (self.unanswered, "rows without an answer"),
        ):
            if count:
                lines.append(f"{count:,} {what}")
        domains = ", ".join(f"{name} {count:,}" for name, count in sorted(self.domains.items()))
        tokens = f"{self.tokens:,} tokens, {self.supervised:,} supervised"
        return [*lines, f"{self.kept:,} of {self.rows:,} rows kept, {tokens} ({domains})"]


def stream(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_key: str | None,
    response_key: str | None,
    max_length: int,
    max_samples: int | None,
    need_answers: bool,
    report: Report,
    date: datetime.date | None = DATE,
    progress: Callable[[int], object] | None = None,
) -> Iterator[TokenSequence]:
    """Tokenize the first max_samples rows (None: all) of the files, in order.

    prompt_key, response_key: columns, dots reach into structs; None: found by name (see sources.py).
    max_length: rows with more tokens are dropped; so are prompts that leave no room for one token of an answer.
    need_answers: a row without an answer is an error. Otherwise such rows are welcome, and an answer that does not
        fit is left off rather than its row dropped, as the base writes it anew.
    report: counted in while the sequences are taken.
    date: see ChatTemplate.
    progress: called with the number of rows done since the last call.

    A tokenizer without a chat template gets PLAIN_TEMPLATE, unless the files are plain text.

    Raises:
        CorpusError: before any row, what `inspect` raises; with file and row, what a row or the template lacks; at
            the end, that no row is left.
    """
    sources = inspect(files, prompt_key=prompt_key, response_key=response_key, need_answers=need_answers)
    report.layouts = {source.path: source.layout for source in sources}
    template = None
    if any(source.layout.kind != "text" for source in sources):
        report.plain_template = install_plain_template(tokenizer)
        template = ChatTemplate(tokenizer, date)
        report.end_of_turn = template.end_of_turn

    shortest: int | None = None
    rows = islice(chain.from_iterable(read_rows(s, need_answers=need_answers) for s in sources), max_samples)
    while batch := list(islice(rows, ROWS_PER_CALL)):
        for sequence, shortened in _encode(batch, tokenizer, template, need_answers):
            if not need_answers and _has_answer(sequence) and len(sequence) > max_length:
                sequence, shortened = _prompt_of(sequence), True
            report.rows += 1
            needed = len(sequence) + _to_be_written(sequence)
            if needed > max_length:
                report.too_long += 1
                shortest = min(needed, shortest or needed)
            elif len(sequence) < 2:
                report.empty += 1
            else:
                _count(report, sequence, shortened)
                yield sequence
        if progress is not None:
            progress(len(batch))
    if not report.kept:
        what = f"the shortest needs {shortest} tokens, data.max_length is {max_length}" if shortest else "all are empty"
        raise CorpusError(f"no row of {', '.join(map(str, files))} can be used ({report.rows} read): {what}")


def _encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, need_answers: bool
) -> list[tuple[TokenSequence, bool]]:
    """The sequence of each row, and whether its answer was left off because the template cannot place it."""
    sequences: dict[int, TokenSequence] = {}
    texts = {i: row.text for i, row in enumerate(rows) if row.text is not None}
    if texts:
        tokens = tokenizer(list(texts.values()), return_attention_mask=False, verbose=False)["input_ids"]
        for i, ids in zip(texts, tokens, strict=True):
            array = np.array(ids, dtype=np.int32)
            sequences[i] = TokenSequence(array, np.ones(len(array), dtype=np.uint8), rows[i].domain, 0, rows[i].digest)

    shortened: set[int] = set()
    chats: dict[int, Chat] = {}
    if template is not None:
        for i, row in enumerate(rows):
            if row.text is None:
                chats[i], left_off = _render(row, template, need_answers)
                shortened |= {i} if left_off else set()
        encoded = template.encode(list(chats.values()), [rows[i].where for i in chats])
        for i, (ids, mask, prompt_length) in zip(chats, encoded, strict=True):
            sequences[i] = TokenSequence(ids, mask, rows[i].domain, prompt_length, rows[i].digest)
    return [(sequences[i], i in shortened) for i in range(len(rows))]


def _render(row: Row, template: ChatTemplate, need_answers: bool) -> tuple[Chat, bool]:
    """A row's chat, and whether its answer was left off."""
    try:
        try:
            return template.render(row.messages), False
        except PrefixError:
            # Some templates (of models that think first) have no place for a ready answer after their generation
            # prompt. Where the base writes the answer anyway, its prompt is all that is needed.
            if need_answers or not row.answered:
                raise
            return template.render(row.messages[:-1]), True
    except CorpusError as error:
        raise CorpusError(f"{row.where}: {error}") from error


def _to_be_written(sequence: TokenSequence) -> bool:
    return sequence.prompt_length > 0 and sequence.prompt_length == len(sequence)


def _has_answer(sequence: TokenSequence) -> bool:
    return 0 < sequence.prompt_length < len(sequence)


def _prompt_of(sequence: TokenSequence) -> TokenSequence:
    n = sequence.prompt_length
    return replace(sequence, ids=sequence.ids[:n], mask=sequence.mask[:n])


def _count(report: Report, sequence: TokenSequence, shortened: bool) -> None:
    report.kept += 1
    report.shortened += shortened
    report.unanswered += _to_be_written(sequence) and not shortened
    report.tokens += len(sequence)
    report.supervised += int(sequence.mask.sum())
    report.domains[sequence.domain] += 1

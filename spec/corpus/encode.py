"""Parquet files -> token sequences, in pieces, with a report of what happened to the rows."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spec.corpus.chat import Chat, ChatTemplate, install_plain_template
from spec.corpus.layouts import Layout, inspect
from spec.corpus.rows import Rejected, Row, read_rows
from spec.corpus.sequences import CorpusError, TokenSequence
from spec.corpus.tokens import tokenize
from spec.corpus.turns import RowError
from spec.section import DATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_PER_CALL = 256  # a fast tokenizer spreads the texts of one call over the cores
SHOWN = 5  # bad rows that an error names
REASONS = 10  # and reasons
RENDERED = re.compile(
    r"(?i)<\|(im_start|start_header_id|user)\|>|<start_of_turn>|\[/inst]|\A\s*(human|user):|\b(assistant|response):\s*\Z"
)


@dataclass
class Report:
    """What happened to the rows; `stream` counts in it as it goes."""

    rows: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # rows that cannot be used, by reason
    rejected_rows: list[str] = field(default_factory=list)  # the first of them
    too_long: int = 0
    beyond: int = 0  # dropped rows that are longer than the base has positions
    stretched: int = 0  # kept rows that are longer than what the base was trained for
    empty: int = 0  # dropped rows of plain text with fewer than two tokens: there is nothing to predict
    unanswered: int = 0  # kept rows without an answer in the data, to be written by the base
    shortened: int = 0  # kept rows whose answer does not fit or has no place: the base writes another
    unplaced: int = 0  # earlier turns, unsupervised as they are not rendered after their generation prompt
    rendered: int = 0  # kept rows in which a user's turn looks like the rendering of a chat template
    tokens: int = 0
    supervised: int = 0
    domains: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)  # turns of kept conversations
    turns: Counter[int] = field(default_factory=Counter)  # kept conversations by their number of turns
    prompts: set[int] = field(default_factory=set)  # a hash of each kept row's prompt or text, to compare splits
    layouts: dict[Path, Layout] = field(default_factory=dict)
    empty_files: list[Path] = field(default_factory=list)
    plain_template: bool = False
    end_of_turn: str | None = None

    def lines(self) -> list[str]:
        """The report in words, for a log: the layouts first, the totals last."""
        by_layout: dict[Layout, list[Path]] = {}
        for path, layout in self.layouts.items():
            by_layout.setdefault(layout, []).append(path)
        lines = [f"{_named(paths)}: {layout}" for layout, paths in by_layout.items()]
        if self.empty_files:
            lines.append(f"{_named(self.empty_files)}: skipped, since there is no row")
        if self.plain_template:
            lines.append("the base has no chat template: a plain one is used (User: ... Assistant: ...)")
        if self.end_of_turn is None and any(layout.kind != "text" for layout in by_layout):
            lines.append("the chat template closes answers with no special token: they end with their last word")
        for count, what in (
            (self.rejected.total(), f"bad rows left out: {self.reasons()}"),
            (self.too_long, "rows dropped: longer than max_length"),
            (self.beyond, "rows dropped: longer than the base has positions"),
            (self.stretched, "rows are longer than the positions that the base was trained for"),
            (self.empty, "rows dropped: empty text"),
            (self.shortened, "answers left out: too long, or not directly after the template's generation prompt"),
            (self.unanswered, "rows without an answer"),
            (self.rendered, "rows in which a user's turn looks rendered by a chat template already (<|im_start|>)"),
            (self.unplaced, "earlier assistant turns not supervised: rendered differently after a generation prompt"),
        ):
            if count:
                lines.append(f"{count:,} {what}")
        domains = ", ".join(f"{name} {count:,}" for name, count in sorted(self.domains.items()))
        tokens = f"{self.tokens:,} tokens, {self.supervised:,} supervised"
        return [*lines, f"{self.kept:,} of {self.rows:,} rows kept, {tokens} ({domains})"]

    def reasons(self) -> str:
        """Why rows cannot be used, the most frequent reason first."""
        shown = [f"{count:,} x {reason}" for reason, count in self.rejected.most_common(REASONS)]
        return "; ".join([*shown, *(["..."] if len(self.rejected) > REASONS else [])])


@dataclass(frozen=True)
class _Encoded:
    row: Row
    sequence: TokenSequence
    shortened: bool = False  # as in Report
    unplaced: int = 0


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
    ignore_columns: Sequence[str] = (),
    skip_bad_rows: bool = False,
    max_positions: int | None = None,
    trained_positions: int | None = None,
    vocab_size: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Iterator[TokenSequence]:
    """Tokenize the first max_samples rows (None: all) of the files, in order, and count in `report` meanwhile.

    prompt_key, response_key: columns, dots reach into structs; None: found by name (see layouts.py).
    max_length: rows with more tokens are dropped; so are prompts that leave no room for one token of an answer.
    need_answers: a row without an answer is a bad row. Otherwise an answer that does not fit is left off rather than
        its row dropped, as the base writes it anew.
    ignore_columns: columns that count as absent.
    skip_bad_rows: rows that cannot be used are left out; otherwise they are an error once all rows are read.
    max_positions, trained_positions: longer rows are dropped as with max_length, or kept and counted; None: no limit.
    vocab_size: rows of the base's lm_head, which a token needs; None: not checked.
    progress: called with the number of rows done since the last call.

    A tokenizer without a chat template gets PLAIN_TEMPLATE, unless the files are plain text.
    """
    keys = {"prompt_key": prompt_key, "response_key": response_key}
    sources = inspect(files, **keys, need_answers=need_answers, ignore_columns=ignore_columns)
    report.layouts |= {source.path: source.layout for source in sources}
    report.empty_files += [path for path in files if path not in report.layouts]
    template = None
    if any(source.layout.kind != "text" for source in sources):
        report.plain_template = install_plain_template(tokenizer)
        template = ChatTemplate(tokenizer, date)
        report.end_of_turn = template.end_of_turn

    longest = max_length if max_positions is None else min(max_length, max_positions)
    shortest: int | None = None
    rows = islice(chain.from_iterable(read_rows(s, need_answers=need_answers) for s in sources), max_samples)
    while batch := list(islice(rows, ROWS_PER_CALL)):
        for item in _encode(batch, tokenizer, template, need_answers):
            report.rows += 1
            if isinstance(item, Rejected):
                report.rejected[item.reason] += 1
                report.rejected_rows += [f"{item.where}: {item.reason}"][: SHOWN - len(report.rejected_rows)]
                continue
            sequence, prompt = item.sequence, item.sequence.prompt_length
            if not need_answers and 0 < prompt < len(sequence) and len(sequence) > longest:
                sequence = replace(sequence, ids=sequence.ids[:prompt], mask=sequence.mask[:prompt])
                item = replace(item, sequence=sequence, shortened=True)
            needed = len(sequence) + _to_be_written(sequence)
            if needed > longest:
                beyond = max_positions is not None and needed > max_positions
                report.beyond += beyond
                report.too_long += not beyond
                shortest = min(needed, shortest or needed)
            elif len(sequence) < 2:
                report.empty += 1
            else:
                _check_vocabulary(sequence, tokenizer, vocab_size, item.row.where)
                report.stretched += trained_positions is not None and needed > trained_positions
                _count(report, item)
                yield sequence
        if progress is not None:
            progress(len(batch))
    bad = report.rejected.total()
    if bad and (not skip_bad_rows or bad == report.rows):
        first = "\n  ".join(report.rejected_rows)
        advice = "" if bad == report.rows else "\ndata.skip_bad_rows=true leaves such rows out"
        what = f"{bad:,} of {report.rows:,} rows cannot be used: {report.reasons()}"
        raise CorpusError(f"{what}. The first:\n  {first}{advice}")
    if not report.kept:
        limit = f"data.max_length is {max_length}"
        limit += "" if max_positions is None else f", and the base has {max_positions} positions"
        what = f"the shortest needs {shortest} tokens, {limit}" if shortest else "all are empty"
        raise CorpusError(f"no row of {', '.join(map(str, files))} can be used ({report.rows} read): {what}")


def _encode(
    rows: Sequence[Row | Rejected],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    need_answers: bool,
) -> list[_Encoded | Rejected]:
    """Each row's sequence, in order."""
    done: dict[int, _Encoded | Rejected] = {}
    texts: dict[int, tuple[Row, str]] = {}
    chats: dict[int, tuple[Row, Chat]] = {}
    for i, row in enumerate(rows):
        if isinstance(row, Rejected):
            done[i] = row
        elif row.text is not None:
            texts[i] = row, row.text
        elif template is not None:
            try:
                chats[i] = row, template.render(row.messages, row.tools, need_answer=need_answers)
            except RowError as error:
                done[i] = Rejected(row.where, str(error))
            except CorpusError as error:
                raise CorpusError(f"{row.where}: {error}") from error
    if texts:
        tokens = tokenizer([text for _, text in texts.values()], return_attention_mask=False, verbose=False)
        for (i, (row, _)), ids in zip(texts.items(), tokens["input_ids"], strict=True):
            array, mask = np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=np.uint8)
            done[i] = _Encoded(row, TokenSequence(array, mask, row.domain, 0, row.digest))
    encoded = tokenize(tokenizer, [chat for _, chat in chats.values()])
    for (i, (row, chat)), (ids, mask, prompt_length) in zip(chats.items(), encoded, strict=True):
        sequence = TokenSequence(ids, mask, row.domain, prompt_length, row.digest)
        left_off = row.answered and _to_be_written(sequence)
        if left_off and need_answers:
            done[i] = Rejected(row.where, "the tokens of the answer cannot be told from its prompt's")
        else:
            done[i] = _Encoded(row, sequence, left_off, chat.unplaced)
    return [done[i] for i in range(len(rows))]


def _check_vocabulary(sequence: TokenSequence, tokenizer: Any, vocab_size: int | None, where: str) -> None:
    highest = int(sequence.ids.max())
    if vocab_size is not None and highest >= vocab_size:
        raise CorpusError(
            f"{where}: the token {tokenizer.convert_ids_to_tokens(highest)!r} has id {highest}, and the base has "
            f"{vocab_size} rows in its lm_head: tokenizer and base do not belong together, or the tokenizer was given "
            "tokens for which the base was not enlarged"
        )


def _to_be_written(sequence: TokenSequence) -> bool:
    return sequence.prompt_length > 0 and sequence.prompt_length == len(sequence)


def _count(report: Report, item: _Encoded) -> None:
    sequence, messages = item.sequence, item.row.messages
    report.kept += 1
    report.shortened += item.shortened
    report.unplaced += item.unplaced
    report.rendered += any(RENDERED.search(turn["content"]) for turn in messages if turn["role"] == "user")
    report.unanswered += _to_be_written(sequence) and not item.shortened
    report.tokens += len(sequence)
    report.supervised += int(sequence.mask.sum())
    report.domains[sequence.domain] += 1
    report.roles.update(message["role"] for message in messages)
    report.turns.update([len(messages)] if messages else [])
    report.prompts.add(hash(sequence.source))


def _named(paths: Sequence[Path]) -> str:
    return f"{paths[0]}{f' and {len(paths) - 1} more files' if paths[1:] else ''}"

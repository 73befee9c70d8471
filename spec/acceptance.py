"""How many drafted tokens the base would accept, exactly, from cached features alone.

Every acceptance figure of the project is defined here, once; docs/metrics.md explains them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from spec.heads import Speculator
from spec.store.reader import CachedSequence, SequenceReader

CHUNK = 2048
"""Positions drafted from at one time."""


@dataclass(frozen=True)
class Walk:
    """One answer, decoded on paper.

    Attributes:
        accepted: for each step, how many drafts the base would have accepted.
        domain: of the answer.
        looping: whether the answer ends in a loop.
        greedy: whether the base wrote it greedily, so that the walk is what decoding would do.
    """

    accepted: NDArray[np.int64]
    domain: str = ""
    looping: bool = False
    greedy: bool = True


def walk(matches: Sequence[int], length: int) -> NDArray[np.int64]:
    """Accepted drafts of each step while an answer of `length` tokens is decoded.

    The answer's first token costs no draft. Then each step drafts, keeps the drafts that match, takes the base's own
    token, and the next step starts behind it; so only the places where decoding stops are counted. Accepted drafts
    are capped at the tokens left.

    Args:
        matches: for each token of the answer, how many drafts made right behind it equal what follows.
        length: tokens of the answer.
    """
    accepted = []
    at = 0
    while at < length - 1:
        accepted.append(min(int(matches[at]), length - 1 - at))
        at += 1 + accepted[-1]
    return np.asarray(accepted, np.int64)


def tokens_per_step(walks: Iterable[Walk]) -> float:
    """1 + accepted drafts / steps: tokens per forward of the base, its own token counted."""
    steps = [walk.accepted for walk in walks if len(walk.accepted)]
    return 1.0 + float(np.concatenate(steps).mean()) if steps else 1.0


def acceptance(walks: Iterable[Walk], n: int) -> list[float]:
    """For i = 1..n the share of steps in which at least i drafts were accepted."""
    accepted = np.concatenate([np.empty(0, np.int64), *(walk.accepted for walk in walks)])
    return [float((accepted >= i).mean()) if len(accepted) else 0.0 for i in range(1, n + 1)]


def interval(walks: Sequence[Walk], samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of tokens_per_step, by bootstrap over answers."""
    steps = np.array([len(walk.accepted) for walk in walks], np.float64)
    accepted = np.array([walk.accepted.sum() for walk in walks], np.float64)
    if not steps.sum():
        return 1.0, 1.0
    drawn = np.random.default_rng(seed).integers(len(walks), size=(samples, len(walks)))
    ratios = 1 + accepted[drawn].sum(1) / np.maximum(steps[drawn].sum(1), 1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def loops(answer: Sequence[int], copies: int = 3, span: int = 24, longest: int = 64) -> bool:
    """Whether an answer ends in `copies` or more copies of one block (of at most `longest` tokens) that together
    cover at least `span` tokens. A closing stop token does not hide a loop."""
    for tail in (np.asarray(answer), np.asarray(answer)[:-1]):
        for period in range(1, min(longest, len(tail) // copies) + 1):
            length = max(copies * period, span)
            if length <= len(tail) and np.array_equal(tail[-length:-period], tail[-length + period :]):
                return True
    return False


@dataclass(frozen=True)
class Answer:
    """The last answer of a cached sequence, and what was drafted behind each of its tokens.

    Attributes:
        ids: the whole sequence.
        start: where the answer begins.
        drafts: [L, n], row j drafted behind the answer's token j.
        index: its place in the split.
    """

    ids: NDArray[np.int32]
    start: int
    drafts: NDArray[np.int64]
    index: int

    @property
    def length(self) -> int:
        """Tokens of the answer."""
        return len(self.ids) - self.start

    def matches(self, drafts: Iterable[Sequence[int]]) -> list[int]:
        """For each token of the answer, how many of the drafts behind it equal what follows."""
        tokens = self.ids.tolist()
        places = range(self.start + 1, len(tokens) + 1)
        return [matching(draft, tokens[at : at + len(draft)]) for at, draft in zip(places, drafts, strict=True)]


def matching(draft: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens of the draft come before the first that is not the wanted one."""
    pairs = zip(draft, wanted, strict=False)
    return next((i for i, (drafted, token) in enumerate(pairs) if drafted != token), min(len(draft), len(wanted)))


@torch.inference_mode()
def draft_answers(
    speculator: Speculator,
    reader: SequenceReader,
    indices: Sequence[int] | None = None,
    on_positions: Callable[[int], object] = lambda count: None,
) -> list[Answer]:
    """Draft behind every token of the last answer of each sequence; no base model is needed.

    Sequences of plain text count as answers that begin at their second token; sequences without a state behind
    their prompt are left out.
    """
    device = next(speculator.parameters()).device
    answers: list[Answer] = []
    pending: list[tuple[int, CachedSequence]] = []

    def flush() -> None:
        states = torch.cat([s.states for _, s in pending]).to(device)
        tokens = torch.from_numpy(np.concatenate([s.ids[s.positions + 1] for _, s in pending])).long()
        drafts = speculator.draft(states, tokens.to(device)).cpu().numpy()
        row = 0
        for index, sequence in pending:
            start = int(sequence.positions[0]) + 1
            answers.append(Answer(sequence.ids, start, drafts[row : row + len(sequence.positions)], index))
            row += len(sequence.positions)
        on_positions(row)
        pending.clear()

    for index, whole in reader.sequences(range(len(reader)) if indices is None else indices):
        sequence = _last_answer(whole, reader.manifest.prompt_length[index])
        if sequence is not None:
            pending.append((index, sequence))
        if sum(len(s.positions) for _, s in pending) >= CHUNK:
            flush()
    if pending:
        flush()
    return sorted(answers, key=lambda answer: answer.index)


def _last_answer(sequence: CachedSequence, prompt_length: int) -> CachedSequence | None:
    """The sequence cut to the states that lead to its last answer, whose tokens are all supervised."""
    rows = sequence.positions >= max(prompt_length - 1, 0)
    if not rows.any():
        return None
    first, stop = int(rows.argmax()), int(sequence.positions[-1]) + 2
    return CachedSequence(
        sequence.states[first:], sequence.positions[first:], sequence.ids[:stop], sequence.mask[:stop]
    )


def walks(
    reader: SequenceReader, answers: Sequence[Answer], drafts: Callable[[Answer], Iterable[Sequence[int]]]
) -> list[Walk]:
    """Walk over answers with drafts from any source.

    Args:
        reader: knows each answer's domain and who wrote it.
        answers: as draft_answers gives them.
        drafts: the source: for an answer, the drafts behind each of its tokens.
    """
    manifest = reader.manifest
    return [
        Walk(
            walk(answer.matches(drafts(answer)), answer.length),
            manifest.domains[manifest.domain[answer.index]],
            loops(answer.ids[answer.start :].tolist()),
            bool(manifest.written[answer.index]),
        )
        for answer in answers
    ]


def head_drafts(answer: Answer) -> Iterable[Sequence[int]]:
    """The speculator's own drafts."""
    drafts: list[list[int]] = answer.drafts.tolist()
    return drafts

"""How many drafted tokens the base would accept, exactly, from cached features alone.

Every acceptance figure of the project is defined here, once; docs/metrics.md explains them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spec.base.logits import PLAIN, Logits
from spec.heads import LAST, Packed, Speculator, supervise
from spec.store.reader import SequenceReader

CHUNK = 2048
"""Positions drafted from at one time."""

CHUNK_LOGITS = 2**24
"""Logits of the base [rows, V] that exist at one time."""

K = TypeVar("K")


@dataclass(frozen=True)
class Walk:
    """One answer, decoded on paper.

    Attributes:
        accepted: for each step, how many drafts the base would have accepted.
        domain: of the answer.
        looping: whether the answer ends in a loop.
        greedy: whether the base wrote it greedily, so that the walk is what decoding would do.
        reached: [R, 3], for each draft that the base came to judge (the accepted ones and the first that was not):
            the token of the answer whose state judged it, the draft's place in its step, from 1, and the draft.
    """

    accepted: NDArray[np.int64]
    domain: str = ""
    looping: bool = False
    greedy: bool = True
    reached: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 3), np.int64))


def walk(matches: Sequence[int], length: int) -> NDArray[np.int64]:
    """Accepted drafts of each step while an answer of `length` tokens is decoded.

    The answer's first token costs no draft. Then each step drafts, keeps the drafts that match, takes the base's own
    token, and the next step starts after it. Accepted drafts are capped at the tokens left.

    Args:
        matches: for each token of the answer, how many drafts made right after it equal what follows.
        length: tokens of the answer.
    """
    accepted = []
    at = 0
    while at < length - 1:
        accepted.append(min(int(matches[at]), length - 1 - at))
        at += 1 + accepted[-1]
    return np.asarray(accepted, np.int64)


def _all_accepted(walks: Iterable[Walk]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *(walk.accepted for walk in walks)])


def tokens_per_step(walks: Iterable[Walk]) -> float:
    """1 + accepted drafts / steps: tokens per forward of the base, its own token counted."""
    accepted = _all_accepted(walks)
    return 1.0 + float(accepted.mean()) if len(accepted) else 1.0


def acceptance(walks: Iterable[Walk], n: int) -> list[float]:
    """For i = 1..n the share of steps in which at least i drafts were accepted."""
    accepted = _all_accepted(walks)
    return [float((accepted >= i).mean()) if len(accepted) else 0.0 for i in range(1, n + 1)]


def conditional(walks: Iterable[Walk], n: int) -> list[float]:
    """For i = 1..n the share of steps that accepted draft i, among those that accepted the i - 1 before it."""
    joint = [1.0, *acceptance(walks, n)]
    return [after / before if before else 0.0 for before, after in pairwise(joint)]


def histogram(walks: Iterable[Walk], n: int) -> list[float]:
    """For k = 0..n the share of steps in which exactly k drafts were accepted; of the last, k or more."""
    joint = [1.0, *acceptance(walks, n), 0.0]
    return [more - less for more, less in pairwise(joint)]


def longest(walks: Iterable[Walk]) -> int:
    """The most drafts that a step accepted."""
    return int(_all_accepted(walks).max(initial=0))


def interval(walks: Sequence[Walk], samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of tokens_per_step, by bootstrap over answers."""
    return _percentiles(_resampled(walks, samples, seed))


def gain(walks: Sequence[Walk], baseline: Sequence[Walk], samples: int = 1000, seed: int = 0) -> tuple[float, ...]:
    """What walks gain in tokens_per_step over a baseline on the same answers: the difference, and its 95 % interval
    by bootstrap over answers, both drawn alike."""
    low, high = _percentiles(_resampled(walks, samples, seed) - _resampled(baseline, samples, seed))
    return tokens_per_step(walks) - tokens_per_step(baseline), low, high


def _resampled(walks: Sequence[Walk], samples: int, seed: int) -> NDArray[np.float64]:
    """tokens_per_step of answers drawn with replacement, [samples]."""
    steps = np.array([len(walk.accepted) for walk in walks], np.float64)
    accepted = np.array([walk.accepted.sum() for walk in walks], np.float64)
    if not steps.sum():
        return np.ones(samples)
    drawn = np.random.default_rng(seed).integers(len(walks), size=(samples, len(walks)))
    return np.asarray(1 + accepted[drawn].sum(1) / np.maximum(steps[drawn].sum(1), 1))


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
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
    """The last answer of a cached sequence, and what was drafted after each of its tokens."""

    ids: NDArray[np.int64]  # the whole sequence
    start: int  # of the answer in it
    drafts: NDArray[np.int64]  # [L, n], row j drafted after the answer's token j
    index: int  # of the sequence in the split

    @property
    def length(self) -> int:
        """Tokens of the answer."""
        return len(self.ids) - self.start

    def matches(self, drafts: Iterable[Sequence[int]]) -> list[int]:
        """For each token of the answer, how many of the drafts after it equal what follows."""
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
    n: int | None = None,
) -> list[Answer]:
    """Draft n tokens (n_predict by default) after every token of the last answer of each sequence.

    No base model is needed.

    Sequences of plain text count as answers that begin at their second token; sequences without a state before
    their answer are left out.
    """
    device, length = next(speculator.parameters()).device, n or speculator.config.n_predict
    answers: list[Answer] = []
    pending: list[tuple[int, Packed, Tensor]] = []

    def flush() -> None:
        packed = Packed.join([packed for _, packed, _ in pending])
        before = accumulate((len(packed.starts) for _, packed, _ in pending), initial=0)
        rows = torch.cat([rows + count for (_, _, rows), count in zip(pending, before, strict=False)])
        drafts = speculator.draft_along(packed.to(device), rows.to(device), length).cpu().numpy()
        sizes = np.cumsum([len(rows) for *_, rows in pending])[:-1]
        for (index, one, kept), drafted in zip(pending, np.split(drafts, sizes), strict=True):
            first, last = one.starts[kept[0]], one.starts[kept[-1]]
            answers.append(Answer(one.ids[: last + 2].numpy(), int(first) + 1, drafted, index))
        on_positions(len(rows))
        pending.clear()

    for index, packed in reader.sequences(range(len(reader)) if indices is None else indices):
        rows = _last_answer(packed, reader.manifest.prompt_length[index])
        if len(rows):
            pending.append((index, packed, rows))
        if sum(len(rows) for *_, rows in pending) >= CHUNK:
            flush()
    if pending:
        flush()
    return sorted(answers, key=lambda answer: answer.index)


def _last_answer(packed: Packed, prompt_length: int) -> Tensor:
    """The rows of a sequence's starts that lead to its last answer, whose tokens are all supervised."""
    return (packed.starts >= prompt_length - 1).nonzero()[:, 0]


Drafts = Callable[[Answer], Iterable[Sequence[int]]]
"""A source: for an answer, the drafts after each of its tokens."""


def walks(reader: SequenceReader, answers: Sequence[Answer], drafts: Drafts, tokens: int | None = None) -> list[Walk]:
    """Walk over answers of draft_answers with drafts from any source, and over so many tokens of each at most."""
    manifest = reader.manifest
    found = []
    for answer in answers:
        made = list(drafts(answer))
        length = min(answer.length, tokens or answer.length)
        accepted = walk(answer.matches(made), length)
        found.append(
            Walk(
                accepted,
                manifest.domains[manifest.domain[answer.index]],
                loops(answer.ids[answer.start :].tolist()),
                bool(manifest.written[answer.index]),
                _reached(made, accepted, length),
            )
        )
    return found


def _reached(drafts: Sequence[Sequence[int]], accepted: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Walk.reached, from the drafts after each token of an answer of `length` tokens."""
    rows = []
    at = 0
    for count in accepted.tolist():
        judged = min(count + 1, len(drafts[at]), length - 1 - at)
        rows += [(at + i, i, drafts[at][i - 1]) for i in range(1, judged + 1)]
        at += count + 1
    return np.asarray(rows, np.int64).reshape(-1, 3)


def tokens_per_step_by_length(answers: Sequence[Answer], drafts: Drafts, lengths: Sequence[int]) -> list[float]:
    """Tokens per step where every draft of a source is cut to each of these lengths."""
    steps, accepted = np.zeros(len(lengths)), np.zeros(len(lengths))
    for answer in answers:
        matches = np.asarray(answer.matches(drafts(answer)), np.int64)
        for place, length in enumerate(lengths):
            found = walk(np.minimum(matches, length).tolist(), answer.length)
            steps[place] += len(found)
            accepted[place] += found.sum()
    return [float(ratio) for ratio in 1 + accepted / np.maximum(steps, 1)]


@torch.inference_mode()
def expected_acceptance(
    reader: SequenceReader,
    lm_head: Tensor,
    answers: Sequence[Answer],
    walks: Mapping[K, Sequence[Walk]],
    temperatures: Sequence[float],
    on_positions: Callable[[int], object] = lambda count: None,
    *,
    kind: Logits = PLAIN,
    bias: Tensor | None = None,
) -> dict[K, dict[float, list[float]]]:
    """What sampling at a temperature would accept, from the distributions that the cached states stand for.

    A draft d that is certain of itself is accepted with the base's probability p_T(d) (Leviathan et al. 2022, q = 1).
    For i = 1, 2, .. this is the mean of p_T of draft i over the steps of a walk that accepted the i - 1 before it, 0
    where there is no draft i or the answer ends. As T goes to 0 it becomes `conditional` of an answer written greedily.

    Args:
        reader: has the states.
        lm_head: [V, d] of the base.
        answers: of draft_answers.
        walks: over these answers, by source.
        temperatures: each above 0.
        on_positions: called with the number of states just done.
        kind: what turns lm_head times the state into the base's logits.
        bias: [V] of lm_head.

    Returns:
        By source and temperature.
    """
    rows = max(1, CHUNK_LOGITS // len(lm_head))
    place = {answer.index: number for number, answer in enumerate(answers)}
    sums = {
        source: np.zeros((len(temperatures), max([1, *(int(each.reached[:, 1].max(initial=0)) for each in found)])))
        for source, found in walks.items()
    }
    for index, packed in reader.sequences(place):
        states = packed.states[LAST][_last_answer(packed, reader.manifest.prompt_length[index])]
        for start in range(0, len(states), rows):
            part = states[start : start + rows].to(lm_head.device, lm_head.dtype)
            logits = kind.apply_((part @ lm_head.T).float(), bias)  # [rows, V]
            totals = [(logits / temperature).logsumexp(1) for temperature in temperatures]
            for source, found in walks.items():
                reached = found[place[index]].reached
                here = torch.from_numpy(reached[(reached[:, 0] >= start) & (reached[:, 0] < start + rows)])
                row, token = here[:, 0].to(logits.device) - start, here[:, 2].to(logits.device)
                chosen = logits[row, token]
                for t, (temperature, total) in enumerate(zip(temperatures, totals, strict=True)):
                    p = (chosen / temperature - total[row]).exp().cpu().double().numpy()
                    np.add.at(sums[source][t], here[:, 1].numpy() - 1, p)
            on_positions(len(part))
    result: dict[K, dict[float, list[float]]] = {}
    for source, found in walks.items():
        accepted = _all_accepted(found)
        counts = np.array([(accepted >= i).sum() for i in range(sums[source].shape[1])])
        shares = (sums[source] / np.maximum(counts, 1)).tolist()
        result[source] = dict(zip(temperatures, shares, strict=True))
    return result


@torch.inference_mode()
def accuracy(speculator: Speculator, reader: SequenceReader) -> list[float]:
    """For each depth the share of its supervised drafts that are right, where it alone drafts, fed the true tokens."""
    device, index = next(speculator.parameters()).device, speculator.draft_index
    index = None if index is None else index.cpu()
    n = speculator.config.n_predict
    right, count = np.zeros(n), np.zeros(n)
    indices = range(len(reader))
    for packed in reader.batches([indices[start : start + 16] for start in range(0, len(indices), 16)]):
        batch = supervise(packed, n, index).to(device)
        targets = torch.split(batch.targets, batch.sizes)
        for k, vectors in enumerate(speculator.unroll(batch.packed, torch.split(batch.rows, batch.sizes))):
            weight = speculator.output(k)
            rows = max(1, CHUNK_LOGITS // len(weight))
            for part, wanted in zip(torch.split(vectors, rows), torch.split(targets[k], rows), strict=True):
                right[k] += int(((part @ weight.T).max(1).indices == wanted).sum())
        count += batch.counts.numpy()
    return [float(share) for share in right / np.maximum(count, 1)]


def expected_tokens_per_step(conditional: Sequence[float]) -> float:
    """1 + c_1 + c_1 c_2 + ..: tokens per step where draft i is accepted with probability c_i if it is reached."""
    return 1.0 + float(np.cumprod(np.asarray(conditional, np.float64)).sum())


def head_drafts(answer: Answer) -> Iterable[Sequence[int]]:
    """The speculator's own drafts."""
    drafts: list[list[int]] = answer.drafts.tolist()
    return drafts

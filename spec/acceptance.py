"""How many drafted tokens the base would accept, exactly, from cached features alone.

Every acceptance figure of the project is defined here, once; docs/metrics.md explains them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spec.base import Teacher
from spec.drafting import Draft, Drafter, Run, Sources, complete
from spec.heads import LAST, Packed, Speculator, supervise
from spec.store.reader import SequenceReader

CHUNK = 2048
"""Positions drafted from at one time."""

CHUNK_TOKENS = 16384
"""Tokens of sequences, prompts included, that are drafted along at one time."""

CHUNK_LOGITS = 2**24
"""Logits of the base [rows, V] that exist at one time."""

K = TypeVar("K")


@dataclass(frozen=True)
class Walk:
    """The walk over one answer."""

    accepted: NDArray[np.int64]  # for each step, how many drafts the base would have accepted
    domain: str = ""
    looping: bool = False  # whether the answer ends in a loop
    greedy: bool = True  # whether the base wrote it greedily, so that the walk is what decoding would do
    # For each step, how many tokens were drafted, those that the answer is too short for left out.
    drafted: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    # [R, 3], for each draft that the base came to judge (the accepted ones and the first that was not): the token of
    # the answer for which the draft stood, the draft's place in its step, from 1, and the draft.
    reached: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 3), np.int64))


def walk(matches: Sequence[int], length: int) -> NDArray[np.int64]:
    """Accepted drafts of each step while an answer of `length` tokens is decoded.

    The answer's first token costs no draft. Then each step drafts, keeps the drafts that match (`matches` has their
    number after each token), takes the base's own token, and the next step starts after it. Accepted drafts are capped
    at the tokens left.
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


def drafted_per_step(walks: Iterable[Walk]) -> float:
    """Tokens that a step drafts, on average."""
    drafted = np.concatenate([np.empty(0, np.int64), *(walk.drafted for walk in walks)])
    return float(drafted.mean()) if len(drafted) else 0.0


def acceptance(walks: Iterable[Walk], n: int) -> list[float]:
    """For i = 1..n the share of steps in which at least i drafts were accepted."""
    accepted = _all_accepted(walks)
    return [float((accepted >= i).mean()) if len(accepted) else 0.0 for i in range(1, n + 1)]


def conditional(walks: Iterable[Walk], n: int) -> list[float]:
    """For i = 1..n the share of steps that accepted draft i, among those that accepted the i - 1 before it."""
    joint = [1.0, *acceptance(walks, n)]
    return [after / before if before else 0.0 for before, after in pairwise(joint)]


def histogram(walks: Iterable[Walk], n: int) -> list[float]:
    """For k = 0..n the share of steps in which exactly k drafts were accepted; the last also counts more than n."""
    joint = [1.0, *acceptance(walks, n), 0.0]
    return [more - less for more, less in pairwise(joint)]


def longest(walks: Iterable[Walk]) -> int:
    """The most drafts that a step accepted."""
    return int(_all_accepted(walks).max(initial=0))


def interval(walks: Sequence[Walk], baseline: Sequence[Walk] | None = None) -> tuple[float, float]:
    """95 % interval of tokens_per_step, by bootstrap over answers. With a baseline on the same answers it is that of
    the walks' gain over the baseline; each sample draws the same answers for both."""
    values = _resampled(walks) - (0 if baseline is None else _resampled(baseline))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _resampled(walks: Sequence[Walk]) -> NDArray[np.float64]:
    """tokens_per_step of answers drawn with replacement, [1000]."""
    steps = np.array([len(walk.accepted) for walk in walks], np.float64)
    accepted = np.array([walk.accepted.sum() for walk in walks], np.float64)
    if not steps.sum():
        return np.ones(1000)
    drawn = np.random.default_rng(0).integers(len(walks), size=(1000, len(walks)))
    return np.asarray(1 + accepted[drawn].sum(1) / np.maximum(steps[drawn].sum(1), 1))


def loops(answer: Sequence[int]) -> bool:
    """Whether an answer ends in three or more copies of one block of at most 64 tokens that together cover at least 24
    tokens. A closing stop token does not hide a loop."""
    for tail in (np.asarray(answer), np.asarray(answer)[:-1]):
        for period in range(1, min(64, len(tail) // 3) + 1):
            length = max(3 * period, 24)
            if length <= len(tail) and np.array_equal(tail[-length:-period], tail[-length + period :]):
                return True
    return False


@dataclass(frozen=True)
class Answer:
    """The last answer of a cached sequence, and what was drafted after each of its tokens."""

    ids: NDArray[np.int64]  # the whole sequence
    start: int  # of the answer in it
    index: int  # of the sequence in the split
    # After each token of the answer, the draft as far as the base would come to judge it: its accepted tokens and the
    # first one that is not; and how many tokens the draft had.
    drafts: Sequence[Sequence[int]] = ()
    lengths: Sequence[int] = ()

    @property
    def length(self) -> int:
        """Tokens of the answer."""
        return len(self.ids) - self.start

    @property
    def matches(self) -> list[int]:
        """For each token of the answer, how many of the drafts after it equal what follows."""
        tokens = self.ids.tolist()
        places = range(self.start + 1, len(tokens) + 1)
        return [matching(draft, tokens[at : at + len(draft)]) for at, draft in zip(places, self.drafts, strict=True)]

    def drafted(self, drafts: Sequence[Sequence[int]]) -> Answer:
        """The same with these drafts, one after each token."""
        lengths, whole = [len(draft) for draft in drafts], replace(self, drafts=drafts)
        judged = [list(draft[: count + 1]) for draft, count in zip(drafts, whole.matches, strict=True)]
        return replace(self, drafts=judged, lengths=lengths)

    def cut(self, length: int) -> Answer:
        """The same with drafts of at most so many tokens."""
        drafts = [draft[:length] for draft in self.drafts]
        return replace(self, drafts=drafts, lengths=[min(each, length) for each in self.lengths])


def matching(draft: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens of the draft come before the first that is not the wanted one."""
    pairs = zip(draft, wanted, strict=False)
    return next((i for i, (drafted, token) in enumerate(pairs) if drafted != token), min(len(draft), len(wanted)))


@dataclass(frozen=True)
class Part:
    """Answers that are drafted at one time."""

    answers: list[Answer]
    packed: Packed  # their sequences, with their states
    rows: Tensor  # of packed.starts, those before each token of the answers


def parts(reader: SequenceReader, indices: Sequence[int] | None = None) -> Iterator[Part]:
    """The last answers of sequences, all by default, in parts of bounded size.

    Sequences of plain text count as answers that begin at their second token; sequences without a state before
    their answer are left out.
    """
    pending: list[tuple[int, Packed, Tensor]] = []

    def joined() -> Part:
        answers = []
        for index, one, wanted in pending:
            end = int(one.starts[wanted][-1]) + 2  # what is not supervised after the answer is no part of it
            answers.append(Answer(one.ids[:end].numpy(), end - int(wanted.sum()), index))
        rows = torch.cat([wanted for *_, wanted in pending]).nonzero()[:, 0]
        return Part(answers, Packed.join([packed for _, packed, _ in pending]), rows)

    for index, packed in reader.sequences(range(len(reader)) if indices is None else indices):
        wanted = _last_answer(packed, reader.manifest.prompt_length[index])
        if wanted.any():
            pending.append((index, packed, wanted))
        positions = sum(int(wanted.sum()) for *_, wanted in pending)
        if positions >= CHUNK or sum(len(each.ids) for _, each, _ in pending) >= CHUNK_TOKENS:
            yield joined()
            pending = []
    if pending:
        yield joined()


@torch.inference_mode()
def draft_answers(
    speculator: Speculator,
    reader: SequenceReader,
    indices: Sequence[int] | None = None,
    on_positions: Callable[[int], object] = lambda count: None,
    sources: Sources | None = None,
    depth: int | None = None,
) -> list[Answer]:
    """Draft after every token of the last answer of each sequence, without a base: what sources draft, or `depth`
    tokens of the heads, n_predict by default. on_positions is called with the number of positions just drafted from.
    """
    device = next(speculator.parameters()).device
    found: list[Answer] = []
    for part in parts(reader, indices):
        packed, rows = part.packed.to(device), part.rows.to(device)
        if sources is not None:
            drafts = [draft for answer in part.answers for draft in drafts_after(answer, sources)]
            complete(drafts, partial(speculator.draft_along, packed, rows))
            made = [draft.tokens for draft in drafts]
        else:
            made = speculator.draft_along(packed, rows, depth or speculator.config.n_predict).tolist()
        for answer in part.answers:
            found.append(answer.drafted(made[: answer.length]))
            made = made[answer.length :]
        on_positions(len(rows))
    return sorted(found, key=lambda answer: answer.index)


def drafts_after(answer: Answer, sources: Sources) -> list[Draft]:
    """An empty draft after each token of an answer."""
    drafter = Drafter(sources)
    drafter.extend(answer.ids.tolist())
    return [drafter.draft(end=end) for end in range(answer.start + 1, len(answer.ids) + 1)]


def draft_answer(answer: Answer, sources: Sources, run: Run | None = None) -> Answer:
    """The answer with what sources draft after each token; `run` runs the heads at these places."""
    drafts = drafts_after(answer, sources)
    complete(drafts, run)
    return answer.drafted([draft.tokens for draft in drafts])


def _last_answer(packed: Packed, prompt_length: int) -> Tensor:
    """Which of a sequence's starts lead to its last answer, whose tokens are all supervised."""
    return packed.starts >= prompt_length - 1


def walks(reader: SequenceReader, answers: Sequence[Answer], tokens: int | None = None) -> list[Walk]:
    """Walk over answers with their drafts, over at most this many tokens of each."""
    manifest = reader.manifest
    found = []
    for answer in answers:
        length = min(answer.length, tokens or answer.length)
        accepted = walk(answer.matches, length)
        reached, drafted, at = [], [], 0
        for count in accepted.tolist():
            left = length - 1 - at
            drafted.append(min(answer.lengths[at], left))
            reached += [(at + i, i, token) for i, token in enumerate(answer.drafts[at][: min(count + 1, left)], 1)]
            at += count + 1
        found.append(
            Walk(
                accepted,
                manifest.domains[manifest.domain[answer.index]],
                loops(answer.ids[answer.start :].tolist()),
                bool(manifest.written[answer.index]),
                np.asarray(drafted, np.int64),
                np.asarray(reached, np.int64).reshape(-1, 3),
            )
        )
    return found


def tokens_per_step_by_length(answers: Sequence[Answer], lengths: Sequence[int]) -> list[float]:
    """Tokens per step if every draft is cut to each of these lengths."""
    matches = [np.asarray(answer.matches, np.int64) for answer in answers]
    return [
        tokens_per_step(Walk(walk(np.minimum(found, length).tolist(), len(found))) for found in matches)
        for length in lengths
    ]


@torch.inference_mode()
def expected_acceptance(
    reader: SequenceReader,
    teacher: Teacher,
    answers: Sequence[Answer],
    walks: Mapping[K, Sequence[Walk]],
    temperatures: Sequence[float],
    on_positions: Callable[[int], object] = lambda count: None,
) -> dict[K, dict[float, list[float]]]:
    """What sampling at a temperature would accept, from the distributions that the cached states stand for.

    A draft d that is certain of itself is accepted with the base's probability p_T(d) (Leviathan et al. 2022, q = 1).
    For i = 1, 2, .. this is the mean of p_T of draft i over the steps of a walk that accepted the i - 1 before it, 0
    where there is no draft i or the answer ends. As T goes to 0 it becomes `conditional` of an answer written greedily.

    `walks` are over these answers, by source; the result is by source and temperature (above 0). on_positions is called
    with the number of states just done.
    """
    lm_head = teacher.lm_head
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
            logits = teacher.finish((part @ lm_head.T).float())  # [rows, V]
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
    shares = {}
    for source, found in walks.items():
        counts = (_all_accepted(found)[:, None] >= np.arange(sums[source].shape[1])).sum(0)
        shares[source] = dict(zip(temperatures, (sums[source] / np.maximum(counts, 1)).tolist(), strict=True))
    return shares


@torch.inference_mode()
def accuracy(speculator: Speculator, reader: SequenceReader) -> list[float]:
    """For each depth the share of its supervised drafts that are right, given the true tokens before them."""
    device, n = next(speculator.parameters()).device, speculator.config.n_predict
    index = None if speculator.draft_index is None else speculator.draft_index.cpu()
    right, count, indices = np.zeros(n), np.zeros(n), range(len(reader))
    for packed in reader.batches([indices[start : start + 16] for start in range(0, len(indices), 16)]):
        batch = supervise(packed, n, index).to(device)
        targets = torch.split(batch.targets, batch.sizes)
        for k, vectors in enumerate(speculator.unroll(batch.packed, torch.split(batch.rows, batch.sizes))):
            weight = speculator.output(k)
            parts = torch.split(vectors, max(1, CHUNK_LOGITS // len(weight)))
            likeliest = [(part @ weight.T).max(1).indices for part in parts]
            right[k] += int((torch.cat(likeliest) == targets[k]).sum())
        count += batch.counts.numpy()
    return [float(share) for share in right / np.maximum(count, 1)]


def expected_tokens_per_step(conditional: Sequence[float]) -> float:
    """1 + c_1 + c_1 c_2 + ..: tokens per step if each draft i that is reached is accepted with probability c_i."""
    return 1.0 + float(np.cumprod(np.asarray(conditional, np.float64)).sum())

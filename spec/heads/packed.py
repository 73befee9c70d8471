"""What heads read, vectors of the base over whole sequences, and the targets of their drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Tap:
    """One vector of the base for each of some positions of a sequence."""

    # The output after so many layers (0: the embedded tokens); None: after the final norm, what lm_head reads.
    layer: int | None = None
    positions: Literal["answers", "all"] = "answers"  # "answers": those t whose next token x_{t+1} is supervised


LAST = Tap()
"""What lm_head reads at the positions of answers; the base's own distributions follow from it."""


@dataclass(frozen=True)
class Packed:
    """Whole sequences, one after the other: T tokens of R sequences."""

    ids: Tensor  # [T]
    mask: Tensor  # [T], whether a token is supervised
    places: Tensor  # [T], of each token in its sequence
    offsets: tuple[int, ...]  # R + 1 places where sequences begin, and T
    starts: Tensor  # [P] ascending places t from which heads draft, those of "answers"
    bounds: tuple[int, ...]  # R + 1 places in starts where those of each sequence begin, and P
    states: Mapping[Tap, Tensor]  # [P, width] (answers) or [T, width] (all)

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor, lengths: Iterable[int], states: Mapping[Tap, Tensor]) -> Packed:
        """Sequences of these lengths, in whose tokens `starts` is found."""
        lengths = list(lengths)
        offsets = tuple(accumulate(lengths, initial=0))
        places = torch.cat([torch.arange(0), *map(torch.arange, lengths)]).to(ids.device)
        following = F.pad(mask, (0, 1))
        following[list(offsets)] = False  # nothing comes before a first token
        starts = following.nonzero()[:, 0] - 1
        bounds = torch.searchsorted(starts, torch.tensor(offsets, device=starts.device)).tolist()
        return cls(ids, mask, places, offsets, starts, tuple(bounds), states)

    @classmethod
    def join(cls, parts: Sequence[Packed]) -> Packed:
        """The sequences of all parts, of which there is at least one, in order."""
        return cls.of(
            torch.cat([part.ids for part in parts]),
            torch.cat([part.mask for part in parts]),
            [b - a for part in parts for a, b in pairwise(part.offsets)],
            {tap: torch.cat([part.states[tap] for part in parts]) for tap in parts[0].states},
        )

    def to(self, device: torch.device) -> Packed:
        """The same on a device; the copy from page-locked memory does not wait."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Packed:
        """The same in page-locked memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Packed:
        states = {tap: change(tensor) for tap, tensor in self.states.items()}
        tensors = {name: change(getattr(self, name)) for name in ("ids", "mask", "places", "starts")}
        return replace(self, **tensors, states=states)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Supervision:
    """A micro-batch with the targets of its drafts; made on the CPU, so that its sizes are known without waiting for a
    device.

    The draft of depth k that begins at t predicts x_{t+2+k}. It is supervised where x_{t+1} .. x_{t+2+k} all lie in one
    supervised span of one sequence.

    Where a teacher's distributions are the targets, every depth has one row for each place where the base wrote a
    target, in the same order; where a depth has no target there (in the first n - 1 of a supervised span), the row is
    padding of weight 0.
    """

    packed: Packed
    rows: Tensor  # [M] rows of packed.starts from which drafts begin, depth after depth
    targets: Tensor  # [M] the logits' index of each target, -1 where the draft vocabulary lacks it
    depths: Tensor  # [M] the depth that the row trains; padded rows have depth n and weight 0
    taught: Tensor  # [R] the rows of packed.starts at which the base wrote targets, ascending; empty without a teacher
    sizes: list[int]  # rows of each depth
    counts: Tensor  # [n] supervised drafts of each depth, those with targets outside the draft vocabulary included

    @property
    def positions(self) -> int:
        """How many places drafts begin from."""
        return len(self.packed.starts)

    def to(self, device: torch.device) -> Supervision:
        """The same on a device, but for `counts`; the copy from page-locked memory does not wait."""
        return self._with(lambda part: part.to(device, non_blocking=True), self.packed.to(device))

    def pin(self) -> Supervision:
        """The same in page-locked memory, but for `counts`."""
        return self._with(Tensor.pin_memory, self.packed.pin())

    def _with(self, change: Callable[[Tensor], Tensor], packed: Packed) -> Supervision:
        changed: dict[str, Any] = {
            name: change(getattr(self, name)) for name in ("rows", "targets", "depths", "taught")
        }
        return replace(self, packed=packed, **changed)


def supervise(packed: Packed, n: int, draft_index: Tensor | None = None, *, taught: bool = False) -> Supervision:
    """Line up the drafts of n depths with their targets; the sequences are on the CPU, and their states are not used.

    draft_index [V] has the draft id of each full id, -1 where it is not drafted; None without a draft vocabulary. Where
    the base's distributions are the targets (taught), drafts whose written token is outside the draft vocabulary train
    as well.
    """
    starts = packed.starts
    broken = ~F.pad(packed.mask, (0, 1))
    broken[list(packed.offsets)] = True
    breaks = broken.nonzero()[:, 0]
    after = breaks[torch.searchsorted(breaks, starts + 1, right=True)]  # where the span of x_{t+1} has ended
    valid = (after - starts - 1)[:, None] >= torch.arange(2, n + 2)  # [P, n]
    following = F.pad(packed.ids, (0, n + 1))
    if taught:
        # x_{t+2+k} was written at t + 1 + k, which lies 1 + k rows below.
        supervised = torch.stack([F.pad(valid[:, k], (1 + k, n - 1 - k)) for k in range(n)], 1)  # [P + n, n]
        writers = supervised.any(1).nonzero()[:, 0]
        sizes = [len(writers)] * n
        rows = torch.cat([(writers - 1 - k).clamp(min=0) for k in range(n)])
        depths = torch.where(supervised[writers], torch.arange(n), n).T.flatten()
    else:
        writers = torch.zeros(0, dtype=torch.int64)
        drafted = valid
        if draft_index is not None:
            drafted = valid & (draft_index[following[starts[:, None] + torch.arange(2, n + 2)]] >= 0)
        depths, rows = drafted.T.nonzero(as_tuple=True)
        sizes = depths.bincount(minlength=n).tolist()
    targets = torch.cat([following[starts[part] + 2 + k] for k, part in enumerate(torch.split(rows, sizes))])
    if draft_index is not None:
        targets = draft_index[targets]
    return Supervision(packed, rows, targets, depths, writers, sizes, valid.sum(0))

"""Which rows are computed, in which groups, each of which becomes one segment, and how many at a time."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from spec.store.segment import StoreError

log = logging.getLogger(__name__)

T = TypeVar("T")


def item_key(*arrays: NDArray[Any]) -> str:
    """Content key of one row: 128 bits of SHA-256 over its arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{len(array)}:".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def plan_groups(
    keys: Sequence[str],
    lengths: Sequence[int],
    known: Iterable[str],
    bucket: Callable[[int], int],
    limit: int,
    cost: Callable[[int], int] = lambda length: length,
) -> list[list[int]]:
    """Group the rows that are not stored yet.

    A group takes rows of one bucket in the order of the data and closes by its own content alone. So taking
    finished groups away leaves the others as they are: a resumed run and several workers make the same segments as
    one uninterrupted worker, and appended rows make new ones.

    Args:
        keys: content key of each row; repeated rows count once.
        lengths: tokens of each row.
        known: keys already stored.
        bucket: padded length of a row of this length.
        limit: a group closes once its rows' costs reach this.
        cost: of a row of this length.

    Returns:
        Row numbers by group, the longest bucket first, so that running out of memory happens at once.
    """
    seen = set(known)
    groups: dict[int, list[list[int]]] = {}
    filled: dict[int, int] = {}
    for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
        if key in seen:
            continue
        seen.add(key)
        padded = bucket(length)
        if filled.get(padded, limit) >= limit:
            groups.setdefault(padded, []).append([])
            filled[padded] = 0
        groups[padded][-1].append(row)
        filled[padded] += cost(length)
    return [group for padded in sorted(groups, reverse=True) for group in groups[padded]]


@dataclass
class Parts:
    """What the base takes at a time: halved, for all groups that follow, whenever memory runs out.

    Attributes:
        size: what a part costs, at most.
        too_much: the parameter to lower where memory does not suffice for a single row.
        begin: what to lower so that a run begins with smaller parts, in words.
    """

    size: int
    too_much: str
    begin: str = "data.max_length"

    def run(self, work: Callable[[slice], T], lengths: Sequence[int], cost: int = 1) -> Iterator[tuple[slice, T]]:
        """Work on one part of a group after the other; gives each part and what came of it.

        Args:
            work: takes the rows of a part.
            lengths: tokens of each row of the group.
            cost: of each row.

        Raises:
            StoreError: memory does not suffice for a single row.
        """
        start = 0
        while start < len(lengths):
            count = min(max(1, self.size // cost), len(lengths) - start)
            part = slice(start, start + count)
            try:
                done = work(part)
            except torch.OutOfMemoryError as error:
                if count == 1:
                    raise StoreError(
                        f"out of memory at a single sequence of {lengths[start]} tokens ({error}); lower "
                        f"{self.too_much}, or use a device with more memory"
                    ) from None
                self.size = count // 2 * cost
                log.warning("out of memory: going on with %d at a time; lower %s to begin so", count // 2, self.begin)
                continue
            start += count
            yield part, done

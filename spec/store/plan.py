"""Which rows are computed, in which groups, each of which becomes one segment, and how many at a time."""

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
    """Group the rows whose key is not yet `known`; gives row numbers, the longest bucket first, so that running out of
    memory happens at once.

    A group takes rows of one bucket in the order of the data and closes once the costs of its rows reach `limit`. So
    taking finished groups away leaves the others as they are: a resumed run and several workers make the same segments
    as one uninterrupted worker, and appended rows make new ones. Repeated rows count once.
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
    """What the base takes at a time: halved, for all groups that follow, whenever memory runs out."""

    size: int  # what a part costs, at most
    too_much: str  # the parameter to lower where memory does not suffice for a single row
    begin: str = "data.max_length"  # what to lower so that a run begins with smaller parts

    def run(self, work: Callable[[slice], T], lengths: Sequence[int], cost: int = 1) -> Iterator[tuple[slice, T]]:
        """Work on one part after the other of a group of rows with these lengths, which cost the same each; gives each
        part and what came of it."""
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
                log.warning("out of memory: now %d at a time; lower %s to start with fewer", count // 2, self.begin)
                continue
            start += count
            yield part, done

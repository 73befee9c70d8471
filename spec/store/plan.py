"""Which rows are computed, and in which groups; each group becomes one segment."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def item_key(*arrays: NDArray[Any]) -> str:
    """Content key of one row: 128 bits of SHA-256 over its arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{len(array)}:".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def plan(
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
        cost: of a row of this length; its tokens, unless told otherwise.

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

"""Which rows are computed, and in which groups."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spec.store.plan import Parts, item_key, plan_groups
from spec.store.segment import StoreError

LIMIT = 12


def test_a_key_holds_every_array_and_where_it_ends() -> None:
    def key(*parts: list[int], dtype: type = np.int32) -> str:
        return item_key(*(np.asarray(part, dtype) for part in parts))

    keys = [
        key([1, 2, 3], [0, 1, 1]),
        key([1, 2, 3], [1, 1, 1]),
        key([1, 2, 4], [0, 1, 1]),
        key([1, 2, 3, 0], [1, 1]),
        key([1, 2, 3, 0, 1, 1]),
        key([1], [2], dtype=np.uint8),
        key([1, *b"|u1", 2], dtype=np.uint8),
        key([1, 2, 3]),
        key([1, 2, 3], dtype=np.int64),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 32 for key in keys)
    assert key([1, 2, 3]) == item_key(np.asarray([1, 9, 2, 9, 3], np.int32)[::2])


def bucket(length: int) -> int:
    return -(-length // 4) * 4


Rows = list[tuple[str, int]]
rows = st.lists(st.integers(0, 40), max_size=40).map(lambda ids: [(f"k{i}", i % 11 + 1) for i in ids])
costs = st.sampled_from([lambda length: length, lambda length: 5])


def planned(rows: Rows, known: set[str] = frozenset(), cost: Any = lambda length: length) -> list[list[int]]:  # type: ignore[assignment]
    return plan_groups([key for key, _ in rows], [length for _, length in rows], known, bucket, LIMIT, cost)


@given(rows=rows, known=st.sets(st.integers(0, 40).map(lambda i: f"k{i}")), cost=costs)
def test_groups_take_every_missing_row_once_in_order(rows: Rows, known: set[str], cost: Any) -> None:
    groups = planned(rows, known, cost)
    taken = [rows[row][0] for group in groups for row in group]
    assert sorted(taken) == sorted({key for key, _ in rows} - known)
    buckets = [{bucket(rows[row][1]) for row in group} for group in groups]
    assert all(len(found) == 1 for found in buckets)
    order = [found.pop() for found in buckets]
    assert order == sorted(order, reverse=True)  # the longest first
    first = {key: row for row, (key, _) in reversed(list(enumerate(rows)))}
    for padded in set(order):
        inside = [group for group, found in zip(groups, order, strict=True) if found == padded]
        flat = [row for group in inside for row in group]
        assert flat == sorted(flat)
        assert all(first[rows[row][0]] == row for row in flat)
        for number, group in enumerate(inside):
            weights = [cost(rows[row][1]) for row in group]
            assert sum(weights[:-1]) < LIMIT  # it closes as soon as it is full
            assert sum(weights) >= LIMIT or number == len(inside) - 1


@given(rows=rows, data=st.data(), cost=costs)
def test_taking_finished_groups_away_leaves_the_others_as_they_are(rows: Rows, data: st.DataObject, cost: Any) -> None:
    """So a resumed run and several workers make the same segments as one uninterrupted worker."""
    groups = planned(rows, cost=cost)
    done = data.draw(st.sets(st.integers(0, len(groups) - 1))) if groups else set()
    known = {rows[row][0] for number in done for row in groups[number]}
    assert planned(rows, known, cost) == [group for number, group in enumerate(groups) if number not in done]


@pytest.mark.parametrize(
    ("size", "fits", "tried"), [(12, 12, [4, 3]), (30, 9, [7, 3, 3, 1]), (30, 8, [7, 3, *[1] * 7]), (1, 3, [1] * 7)]
)
def test_parts_are_halved_until_they_fit_for_good(size: int, fits: int, tried: list[int]) -> None:
    """Seven rows that cost 3 each."""
    seen: list[int] = []

    def work(part: slice) -> list[int]:
        rows = list(range(7))[part]
        seen.append(len(rows))
        if 3 * len(rows) > fits:
            raise torch.OutOfMemoryError("no memory")
        return rows

    parts = Parts(size, "data.max_length")
    for _ in range(2):
        done = list(parts.run(work, [5] * 7, 3))
        assert [row for _, found in done for row in found] == list(range(7))
        assert all(list(range(7))[part] == found for part, found in done)
    assert seen == [*tried, *(count for count in tried if 3 * count <= fits)]


def test_a_single_row_that_does_not_fit_is_an_error_that_says_what_to_lower() -> None:
    def work(part: slice) -> None:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(StoreError, match=r"single sequence of 120 tokens \(no memory\); lower data\.max_length, or"):
        list(Parts(100, "data.max_length").run(work, [120, 3]))

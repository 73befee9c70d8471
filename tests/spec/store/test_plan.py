"""Which rows are computed, and in which groups."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from spec.store.plan import item_key, plan


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


LIMIT = 12


def bucket(length: int) -> int:
    return -(-length // 4) * 4


Rows = list[tuple[str, int]]
rows = st.lists(st.integers(0, 40), max_size=40).map(lambda ids: [(f"k{i}", i % 11 + 1) for i in ids])
costs = st.sampled_from([lambda length: length, lambda length: 5])


def planned(rows: Rows, known: set[str] = frozenset(), cost: Any = lambda length: length) -> list[list[int]]:  # type: ignore[assignment]
    return plan([key for key, _ in rows], [length for _, length in rows], known, bucket, LIMIT, cost)


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


@given(rows=rows, seed=st.integers(0, 99))
def test_rows_in_another_order_are_all_found(rows: Rows, seed: int) -> None:
    known = {rows[row][0] for group in planned(rows) for row in group}
    shuffled = random.Random(seed).sample(rows, len(rows))
    assert planned(shuffled, known) == []


@given(rows=rows, more=rows)
def test_appended_rows_form_only_new_groups(rows: Rows, more: Rows) -> None:
    known = {key for key, _ in rows}
    groups = planned(rows + more, known)
    assert all(row >= len(rows) for group in groups for row in group)
    # And they are the groups that the appended rows alone would form.
    alone = planned([row for row in more if row[0] not in known])
    assert [[(rows + more)[row][0] for row in group] for group in groups] == [
        [[row for row in more if row[0] not in known][i][0] for i in group] for group in alone
    ]


@given(rows=rows, world=st.integers(1, 4))
def test_the_shares_of_all_workers_are_the_whole(rows: Rows, world: int) -> None:
    groups = planned(rows)
    shares = [groups[rank::world] for rank in range(world)]
    assert sorted(group for share in shares for group in share) == sorted(groups)

"""What is there, what is missing, and in which groups the missing is computed."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec import files
from spec.store import segment
from spec.store.collection import Collection, Writer, item_key, plan

IDENTITY = {"base": "w", "dtype": "bfloat16", "norm": "after the final norm"}


def collection(root: Path, **changed: Any) -> Collection:
    made = Collection(root, "features", IDENTITY | changed)
    made.create()
    return made


def arrays(*values: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"ids": np.asarray(values, np.int32)}


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


@pytest.mark.parametrize("changed", [{"base": "v"}, {"dtype": "float32"}, {"norm": "before"}, {"extra": 1}])
def test_another_identity_is_another_folder(tmp_path: Path, changed: dict[str, Any]) -> None:
    one, other = collection(tmp_path), collection(tmp_path, **changed)
    one.write(["k"], arrays(1), {}, "none")
    assert one.folder != other.folder
    assert one.digest != other.digest
    assert other.find() == {}
    assert one.name_of(["k"]) != other.name_of(["k"])
    assert Collection(tmp_path, "answers", IDENTITY).folder != one.folder


def test_the_identity_is_written_down_once(tmp_path: Path) -> None:
    made = collection(tmp_path)
    path = made.folder / "identity.json"
    assert IDENTITY.items() <= files.read_json(path).items()
    before = path.stat().st_mtime_ns
    made.create()
    assert path.stat().st_mtime_ns == before


def test_rows_are_found_where_they_lie(tmp_path: Path) -> None:
    made = collection(tmp_path)
    first = made.write(["a", "b"], arrays(1, 2), {"rule": "x"}, "none")
    second = made.write(["c"], arrays(3), {}, "zstd")
    expected = {"a": (first.name, 0), "b": (first.name, 1), "c": (second.name, 0)}
    assert made.find() == collection(tmp_path).find() == expected
    assert made.records() == {first.name: first, second.name: second}
    np.testing.assert_array_equal(made.read(second.name)["ids"], [3])
    attributes = segment.zarr.open_group(made.folder / first.name, mode="r").attrs.asdict()
    assert attributes["identity"] == made.digest
    assert (attributes["kind"], attributes["rule"]) == ("features", "x")


def test_later_segments_are_seen_and_earlier_records_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, other = collection(tmp_path), collection(tmp_path)
    made.write(["a"], arrays(1), {}, "none")
    assert set(other.find()) == {"a"}
    read = []
    real = segment.read_record
    monkeypatch.setattr(segment, "read_record", lambda folder, name: read.append(name) or real(folder, name))
    record = made.write(["b"], arrays(2), {}, "none")
    assert set(other.find()) == {"a", "b"}
    assert read == [record.name]


def test_half_written_segments_are_invisible(tmp_path: Path) -> None:
    made = collection(tmp_path)
    record = made.write(["a"], arrays(1), {}, "none")
    (made.folder / record.name).rename(made.folder / f".partial-elsewhere-1-{record.name}")
    (made.folder / ("0" * 32)).mkdir()  # no record
    assert collection(tmp_path).find() == {}


def test_a_record_that_names_other_rows_is_noticed(tmp_path: Path) -> None:
    made = collection(tmp_path)
    record = made.write(["a", "b"], arrays(1, 2), {}, "none")
    path = made.folder / record.name / segment.RECORD
    path.write_text(path.read_text().replace('"b"', '"c"'))  # b and c are one bit apart
    with pytest.raises(segment.StoreError, match=record.name):
        collection(tmp_path).find()


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


def test_the_writer_commits_everything_before_the_block_ends(tmp_path: Path) -> None:
    made = collection(tmp_path)
    with Writer(made, "none") as writer:
        for value in range(5):
            writer.write([f"k{value}"], arrays(value), {})
    assert set(made.find()) == {f"k{value}" for value in range(5)}


def test_the_writer_raises_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Collection, items: list[str], *_: object) -> None:
        raise OSError(f"cannot write {items}")

    monkeypatch.setattr(Collection, "write", fail)
    with pytest.raises(OSError, match="cannot write"), Writer(collection(tmp_path), "none") as writer:
        writer.write(["a"], arrays(1), {})


def test_the_writer_holds_at_most_two_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    started: list[list[str]] = []

    def slow(self: Collection, items: list[str], *_: object) -> None:
        started.append(items)
        go.wait(10)

    monkeypatch.setattr(Collection, "write", slow)
    accepted: list[int] = []

    def produce() -> None:
        with Writer(collection(tmp_path), "none") as writer:
            for value in range(4):
                writer.write([str(value)], arrays(value), {})
                accepted.append(value)

    producer = threading.Thread(target=produce)
    producer.start()
    time.sleep(0.2)
    assert accepted == [0, 1]
    assert started == [["0"]]
    go.set()
    producer.join(10)
    assert accepted == [0, 1, 2, 3]
    assert started == [["0"], ["1"], ["2"], ["3"]]

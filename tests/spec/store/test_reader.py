"""Cached features as heads see them, beside a reference that looks at one position at a time."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spec.corpus import TokenSequence
from spec.store import reader as reader_module
from spec.store.collection import Collection
from spec.store.features import kept_positions
from spec.store.manifest import Manifest
from spec.store.reader import CachedSequence, FeatureReader, prefetch, to_positions
from spec.store.segment import StoreError
from tests.tiny import chain, sequence, states_of, store_features


def cached(row: TokenSequence, width: int = 2) -> CachedSequence:
    positions = kept_positions(row.mask)
    states = torch.from_numpy(states_of(row, width)[positions])
    return CachedSequence(states, positions, row.ids, row.mask)


def brute_force(row: TokenSequence, n: int) -> list[tuple[int, list[int], list[bool]]]:
    """(t, x_{t+1} .. x_{t+1+n}, validity of each head) of every stored position."""
    T, found = len(row), []
    for t in range(T - 1):
        if row.mask[t + 1]:
            tokens = [int(row.ids[t + 1 + i]) if t + 1 + i < T else 0 for i in range(n + 1)]
            valid = [all(k < T and row.mask[k] for k in range(t + 1, t + 2 + i + 1)) for i in range(n)]
            found.append((t, tokens, valid))
    return found


masks = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=0, max_size=4)


@given(masks=masks, n=st.integers(1, 5))
def test_positions_tokens_and_validity(masks: list[list[int]], n: int) -> None:
    rows = [sequence(mask, [100 * k + t + 1 for t in range(len(mask))]) for k, mask in enumerate(masks)]
    found = to_positions([cached(row) for row in rows], n, 2, torch.float32)
    expected = [(row, *entry) for row in rows for entry in brute_force(row, n)]
    assert found.tokens.tolist() == [tokens for _, _, tokens, _ in expected]
    assert found.valid.tolist() == [valid for *_, valid in expected]
    assert found.states.shape == (len(expected), 2)
    for state, (row, t, *_) in zip(found.states, expected, strict=True):
        assert torch.equal(state, torch.from_numpy(states_of(row, 2)[t]))
    assert (found.tokens.dtype, found.valid.dtype) == (torch.int64, torch.bool)
    assert found.tokens.shape == (len(expected), n + 1)
    assert found.valid.shape == (len(expected), n)


def test_two_turns_are_two_spans() -> None:
    """The last tokens of the first answer must not learn the question behind it."""
    row = sequence([0, 1, 1, 0, 0, 1, 1, 1], range(10, 18))
    found = to_positions([cached(row)], 2, 2, torch.float32)
    assert found.tokens[:, 0].tolist() == [11, 12, 15, 16, 17]
    assert found.valid.tolist() == [[True, False], [False, False], [True, True], [True, False], [False, False]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_split_reads_back_in_the_order_of_the_data(tmp_path: Path, dtype: str) -> None:
    rows = chain(9, 24)
    rows = [*rows, rows[3], sequence([0, 0, 0])]  # a repeated row, and one without a state
    reader = FeatureReader(store_features(tmp_path, rows, dtype=dtype, codec="zstd"), tmp_path)
    assert len(reader.manifest.segments) > 2
    assert len(reader) == len(rows)
    for index in [*range(len(rows)), 0]:
        found, row = reader.sequence(index), rows[index]
        np.testing.assert_array_equal(found.ids, row.ids)
        np.testing.assert_array_equal(found.mask, row.mask)
        expected = torch.from_numpy(states_of(row)[found.positions]).to(getattr(torch, dtype))
        assert torch.equal(found.states, expected)
        assert found.states.dtype == reader.dtype
    batch = reader.positions([4, 10, 1], 3)
    expected = to_positions([cached(rows[i], 8) for i in (4, 10, 1)], 3, 8, torch.float32)
    assert torch.equal(batch.states, expected.states.to(reader.dtype))
    assert torch.equal(batch.tokens, expected.tokens)
    assert torch.equal(batch.valid, expected.valid)
    empty = reader.positions([], 3)
    assert (empty.states.shape, empty.tokens.shape, empty.valid.shape) == ((0, 8), (0, 4), (0, 3))


Wide = tuple[list[TokenSequence], Manifest, Path]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Wide:
    """A split of many small segments, two sequences in each."""
    rows, root = chain(60, 24, longest=10), tmp_path_factory.mktemp("wide")
    return rows, store_features(root, rows, segment_tokens=9), root


def test_order_is_a_permutation_that_follows_from_seed_and_epoch(wide: Wide) -> None:
    _, manifest, root = wide
    reader, again = FeatureReader(manifest, root), FeatureReader(manifest, root)
    orders = {(seed, epoch): reader.order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert all(sorted(order) == list(range(len(reader))) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    assert all(again.order(*key) == order for key, order in orders.items())


def test_an_epoch_reads_each_segment_once(wide: Wide, monkeypatch: pytest.MonkeyPatch) -> None:
    _, manifest, root = wide
    assert len(manifest.segments) > 3 * reader_module.WINDOW
    reads: Counter[str] = Counter()
    real = Collection.read
    monkeypatch.setattr(Collection, "read", lambda self, name: (reads.update([name]), real(self, name))[1])
    reader = FeatureReader(manifest, root)
    order = reader.order(0, 0)
    for start in range(0, len(order), 5):
        reader.positions(order[start : start + 5], 2)
    assert set(reads.values()) == {1}
    assert set(reads) == set(manifest.segments)
    window = [manifest.segment[index] for index in order[: 2 * reader_module.WINDOW]]
    assert window != sorted(window, key=window.index)  # sequences of several segments are mixed


def test_a_missing_segment_is_named(tmp_path: Path) -> None:
    manifest = store_features(tmp_path, chain(6, 24))
    lost = manifest.segments[1]
    folder = Collection(tmp_path, "features", manifest.identity).folder
    shutil.rmtree(folder / lost)
    with pytest.raises(StoreError, match=rf"segment {lost} is not in {folder}; run the cache stage"):
        FeatureReader(manifest, tmp_path)
    with pytest.raises(StoreError, match=rf"segment {manifest.segments[0]} is not in"):
        FeatureReader(manifest, tmp_path / "elsewhere")


def test_a_segment_of_another_digest_is_named(tmp_path: Path) -> None:
    manifest = store_features(tmp_path, chain(6, 24))
    other = dataclasses.replace(manifest, digests=[manifest.digests[0], "0" * 64, *manifest.digests[2:]])
    with pytest.raises(StoreError, match=rf"segment {manifest.segments[1]} in .* has the digest {manifest.digests[1]}"):
        FeatureReader(other, tmp_path)


def test_another_identity_is_never_read(tmp_path: Path) -> None:
    manifest = store_features(tmp_path, chain(6, 24))
    with pytest.raises(StoreError, match="is not in"):
        FeatureReader(dataclasses.replace(manifest, identity={**manifest.identity, "dtype": "bfloat16"}), tmp_path)


def test_damage_met_while_reading_names_the_segment(tmp_path: Path) -> None:
    manifest = store_features(tmp_path, chain(6, 24))
    reader = FeatureReader(manifest, tmp_path)
    name = manifest.segments[manifest.segment[2]]
    path = reader.collection.folder / name / "states" / "c" / "0" / "0"
    content = path.read_bytes()
    path.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    with pytest.raises(StoreError, match=name):
        reader.sequence(2)


def test_two_threads_read_one_reader(wide: Wide) -> None:
    rows, manifest, root = wide
    reader = FeatureReader(manifest, root)
    wrong: list[object] = []

    def read(seed: int) -> None:
        try:
            for index in np.random.default_rng(seed).permutation(len(rows)).tolist()[:40]:
                if reader.sequence(index).ids.tolist() != rows[index].ids.tolist():
                    wrong.append(index)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert wrong == []


def prefetching() -> bool:
    return any(thread.name == "prefetch" for thread in threading.enumerate())


@given(st.lists(st.integers(), max_size=20), st.integers(1, 5))
def test_prefetch_hands_on_every_item_in_order(items: list[int], depth: int) -> None:
    assert list(prefetch(iter(items), depth)) == items
    assert not prefetching()


def test_prefetch_raises_where_the_items_do() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise StoreError("damaged")

    stream = prefetch(items())
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(StoreError, match="damaged"):
        next(stream)
    assert not prefetching()


def test_leaving_early_stops_the_thread() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(10**9):
            made.append(i)
            yield i

    stream = prefetch(items(), depth=3)
    assert [next(stream), next(stream)] == [0, 1]
    deadline = time.monotonic() + 5
    while len(made) < 6 and time.monotonic() < deadline:  # two taken, three ready, one in hand
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 6
    stream.close()  # type: ignore[attr-defined]
    assert not prefetching()
    assert len(made) <= 7

"""Cached features as heads read them."""

import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spec.corpus import TokenSequence
from spec.heads import LAST, Packed
from spec.store import codecs
from spec.store import reader as reader_module
from spec.store.codecs import CODECS
from spec.store.collection import Collection
from spec.store.manifest import Manifest
from spec.store.reader import FeatureReader, prefetch
from spec.store.segment import DamagedError, OutdatedError, StoreError
from spec.training.joint import pack
from tests.tiny import TAPS, chain, sequence, states_of, store_features

Wide = tuple[list[TokenSequence], Manifest, Path]


def expected(rows: Sequence[TokenSequence], dtype: torch.dtype = torch.float32) -> Packed:
    """What a reader gives of rows made up by store_features."""
    states = [torch.from_numpy(states_of(row)[np.flatnonzero(row.mask[1:])]) for row in rows]
    return replace(pack(rows), states={LAST: torch.cat([torch.empty(0, 8), *states]).to(dtype)})


def assert_equal(found: Packed, wanted: Packed) -> None:
    assert (found.offsets, found.states.keys()) == (wanted.offsets, wanted.states.keys())
    tensors = ((each.ids, each.mask, each.starts, *map(each.states.get, wanted.states)) for each in (found, wanted))
    for one, other in zip(*tensors, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("dtype", "codec"), [("float32", "zstd"), ("bfloat16", "none"), ("float16", "zstd"), ("bfloat16", "fp8")]
)
def test_a_split_reads_back_in_the_order_of_the_data(tmp_path: Path, dtype: str, codec: str) -> None:
    rows = chain(9, 24)
    rows = [*rows, rows[3], sequence([0, 0, 0])]  # a repeated row, and one without a state
    reader = FeatureReader(store_features(tmp_path, rows, dtype=dtype, codec=codec), tmp_path)
    assert len(reader.manifest.last.segments) > 2
    assert len(reader) == len(rows)
    assert reader.dtype == getattr(torch, dtype)
    for index in [*range(len(rows)), 0]:
        found, wanted = reader.packed([index]), expected([rows[index]], reader.dtype)
        kept = {key: codecs.to_numpy(tensor) for key, tensor in CODECS[codec].encode(wanted.states[LAST]).items()}
        assert_equal(found, replace(wanted, states={LAST: CODECS[codec].decode(kept, reader.dtype)}))
    if codec != "fp8":
        assert_equal(reader.packed([4, 10, 1]), expected([rows[i] for i in (4, 10, 1)], reader.dtype))
    assert_equal(reader.packed([]), expected([], reader.dtype))


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


def test_the_order_mixes_the_segments_of_a_window_and_no_more(wide: Wide) -> None:
    _, manifest, root = wide
    order = FeatureReader(manifest, root).order(0, 0)
    segments = [manifest.last.segment[index] for index in order]
    assert len(set(segments)) > 3 * reader_module.WINDOW
    first = list(dict.fromkeys(segments))[: reader_module.WINDOW]
    window = segments[: sum(segment in first for segment in segments)]
    assert set(window) == set(first)
    assert window != sorted(window, key=window.index)  # sequences of several segments are mixed


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each segment is read."""
    seen, real = Counter[str](), Collection.read
    monkeypatch.setattr(Collection, "read", lambda self, name, only=None: seen.update([name]) or real(self, name, only))
    return seen


def parts_of(order: Sequence[int], size: int) -> list[Sequence[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("size", [1, 5, 16, None])
def test_each_segment_is_read_once_and_few_are_held(wide: Wide, reads: Counter[str], size: int | None) -> None:
    """In an epoch's batches of some size, and by one sequence after the other."""
    _, manifest, root = wide
    assert len(manifest.last.segments) > 3 * reader_module.WINDOW
    reader = FeatureReader(manifest, root, memory=0)
    order = reader.order(0, 1)
    stream = reader.batches(parts_of(order, size)) if size else reader.sequences(order)
    held = [len(reader._segments) for _ in stream]
    assert reads == dict.fromkeys(manifest.last.segments, 1)
    assert max(held) <= reader_module.WINDOW + reader_module.AHEAD + (size or 1) + 1 < len(manifest.last.segments)


def test_as_much_is_kept_as_there_is_room_for(wide: Wide, reads: Counter[str]) -> None:
    _, manifest, root = wide
    every = FeatureReader(manifest, root, memory=10**9)
    for epoch in range(2):
        list(every.batches(parts_of(every.order(0, epoch), 7)))
    assert reads == dict.fromkeys(manifest.last.segments, 1)
    sizes = {name: future.result().bytes for name, future in every._segments.items()}
    room = sum(sizes.values()) // 2
    reader = FeatureReader(manifest, root, memory=room)
    for index in range(len(reader)):
        reader.packed([index])
        assert sum(sizes[name] for name in reader._segments) <= room + 2 * max(sizes.values())
    assert sum(sizes[name] for name in reader._segments) > room - max(sizes.values())
    reads.clear()
    reader.packed([len(reader) - 1])
    assert not reads  # what was used last is kept
    reader.packed([0])
    assert sum(reads.values()) == 1  # what was used first has gone


def test_workers_of_a_machine_share_what_room_is_free(wide: Wide, monkeypatch: pytest.MonkeyPatch) -> None:
    _, manifest, root = wide
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = FeatureReader(manifest, root)._memory
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert FeatureReader(manifest, root)._memory == pytest.approx(alone / 4, rel=0.5)
    assert alone > 2**20


@settings(max_examples=20)
@given(indices=st.lists(st.integers(0, 59), max_size=30), memory=st.sampled_from([0, 10**9]))
def test_sequences_come_with_their_indices_in_the_stores_order(wide: Wide, indices: list[int], memory: int) -> None:
    rows, manifest, root = wide
    found = list(FeatureReader(manifest, root, memory).sequences(indices))
    assert sorted(index for index, _ in found) == sorted(indices)
    places = [(manifest.last.segment[index], manifest.last.row[index]) for index, _ in found]
    assert places == sorted(places)
    for index, one in found:
        assert_equal(one, expected([rows[index]]))


def test_parts_are_asked_for_ahead_but_not_all_at_once(wide: Wide) -> None:
    """An endless stream of parts is read as it goes, and no further than segments are decoded ahead."""
    _, manifest, root = wide
    reader = FeatureReader(manifest, root, memory=0)
    asked: list[int] = []

    def parts() -> Iterator[list[int]]:
        by_segment = sorted(range(len(reader)), key=lambda index: manifest.last.segment[index])
        for index in by_segment * 1000:
            asked.append(manifest.last.segment[index])
            yield [index]

    stream = reader.batches(parts())
    for taken in range(1, 40):
        next(stream)
        assert len(set(asked[taken - 1 :])) <= reader_module.WINDOW + reader_module.AHEAD
        assert len(asked) > taken
    stream.close()  # type: ignore[attr-defined]


@settings(max_examples=30)
@given(batch=st.lists(st.integers(0, 59), max_size=40), world=st.integers(1, 9))
def test_the_shares_of_all_ranks_are_the_batch(wide: Wide, batch: list[int], world: int) -> None:
    _, manifest, root = wide
    reader = FeatureReader(manifest, root, memory=0)
    shares = [reader.share(batch, rank, world) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == sorted(batch)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    segments = [[manifest.last.segment[index] for index in share] for share in shares]
    flat = [segment for share in segments for segment in share]
    assert flat == sorted(flat)  # so that two workers share at most the segment between them


def test_token_counts_are_those_of_the_supervised_tokens(tmp_path: Path, reads: Counter[str]) -> None:
    rows = [*chain(12, 24), sequence([0, 0, 0]), sequence([1, 0, 1, 1], [3, 3, 3, 3])]
    rows = [*rows, rows[2]]  # a row that is there twice counts twice
    manifest = store_features(tmp_path, [*rows, *chain(5, 24, seed=9)])  # rows of other splits lie between
    split = store_features(tmp_path, rows)
    assert set(split.last.segments) < set(manifest.last.segments)
    counts = np.zeros(24, np.int64)
    for row in rows:
        np.add.at(counts, row.ids[row.mask != 0], 1)
    reads.clear()
    reader = FeatureReader(split, tmp_path)
    found = reader.token_counts()
    assert found.tolist() == counts.tolist()
    assert found.dtype == np.int64
    assert reads == dict.fromkeys(split.last.segments, 1)
    everything = np.bincount(np.concatenate([row.ids for row in rows]), minlength=24)
    assert reader.token_counts(prompts=True).tolist() == everything.tolist()


@pytest.fixture(scope="module")
def tapped(tmp_path_factory: pytest.TempPathFactory) -> Wide:
    """A split whose taps lie in segments of other sequences, in another order."""
    rows, root = chain(30, 24, longest=12), tmp_path_factory.mktemp("tapped")
    store_features(root, rows, segment_tokens=30)
    store_features(root, [*rows[::-2], *chain(7, 24, seed=5)], segment_tokens=17, taps=TAPS[:2])
    return rows, store_features(root, rows, segment_tokens=50, taps=TAPS), root


@settings(max_examples=25)
@given(parts=st.lists(st.lists(st.integers(0, 29), max_size=5), max_size=12), memory=st.sampled_from([0, 2000, 10**9]))
def test_taps_are_joined_sequence_by_sequence(tapped: Wide, parts: list[list[int]], memory: int) -> None:
    rows, manifest, root = tapped
    assert len({tuple(places.segment) for places in manifest.taps}) == len(TAPS)
    reader = FeatureReader(manifest, root, memory)
    for part, found in zip(parts, reader.batches(iter(parts)), strict=True):
        chosen = [rows[index] for index in part]
        wanted = expected(chosen)
        whole = torch.cat([torch.empty(0, 8), *(torch.from_numpy(states_of(row)) for row in chosen)])
        states = {LAST: wanted.states[LAST], TAPS[1]: whole + 1, TAPS[2]: wanted.states[LAST] + 2}
        assert_equal(found, replace(wanted, states=states))
        assert_equal(found, reader.packed(part))


def test_a_segment_of_another_digest_and_a_missing_one_are_named(tmp_path: Path) -> None:
    manifest = store_features(tmp_path, chain(6, 24))
    last, lost = manifest.last, manifest.last.segments[1]
    changed = replace(last, digests=[last.digests[0], "0" * 64, *last.digests[2:]])
    reader = FeatureReader(replace(manifest, taps=[changed]), tmp_path)
    for look in (reader.check, reader.token_counts, lambda: list(reader.sequences(range(6)))):
        with pytest.raises(OutdatedError, match=rf"segment {lost} in .* has the digest {last.digests[1]}"):
            look()
    folder = manifest.last.collection(tmp_path).folder
    shutil.rmtree(folder / lost)
    with pytest.raises(DamagedError, match=rf"segment {lost} in {folder} is missing or damaged"):
        FeatureReader(manifest, tmp_path).check()
    with pytest.raises(DamagedError, match=rf"segment {manifest.last.segments[0]} in .*elsewhere/.* is missing"):
        FeatureReader(manifest, tmp_path / "elsewhere").check()


def test_a_store_whose_identity_was_changed_is_never_read(tmp_path: Path) -> None:
    manifest = store_features(tmp_path, chain(6, 24))
    path = manifest.last.collection(tmp_path).folder / "identity.json"
    path.write_text(path.read_text().replace('"layer": "last"', '"layer": 3'))
    with pytest.raises(StoreError, match=r"identity\.json is damaged"):
        FeatureReader(manifest, tmp_path)


@pytest.mark.parametrize("memory", [0, 10**9])
def test_damage_is_met_where_it_lies_and_nowhere_before(wide: Wide, tmp_path: Path, memory: int) -> None:
    rows, manifest, root = wide
    copy = shutil.copytree(root, tmp_path / "copy")
    reader = FeatureReader(manifest, copy, memory)
    parts = parts_of(reader.order(0, 0), 3)
    number = manifest.last.segment[parts[9][1]]
    wrong = manifest.last.segments[number]
    (path,) = (manifest.last.collection(copy).folder / wrong / "states" / "c" / "0").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    spoilt = [any(manifest.last.segment[index] == number for index in part) for part in parts]
    reached = spoilt.index(True)
    stream = reader.batches(parts)
    for part in parts[:reached]:
        assert_equal(next(stream), expected([rows[index] for index in part]))
    with pytest.raises(DamagedError, match=wrong) as caught:
        next(stream)
    assert caught.value.name == wrong
    whole = [part for part, damaged in zip(parts, spoilt, strict=True) if not damaged]
    assert len(list(reader.batches(whole))) == len(whole)  # the rest reads on
    found = []
    with pytest.raises(DamagedError, match=wrong):  # noqa: PT012
        for index, _ in reader.sequences(range(len(reader))):
            found.append(manifest.last.segment[index])
    assert len(found) == sum(each < number for each in manifest.last.segment)


def prefetching() -> bool:
    return any(thread.name.startswith("prefetch") for thread in threading.enumerate())


@given(st.lists(st.integers(), max_size=20), st.integers(1, 5), st.booleans())
def test_prefetch_hands_on_all_in_order_and_raises_where_they_do(items: list[int], depth: int, damaged: bool) -> None:
    def made() -> Iterator[int]:
        yield from items
        if damaged:
            raise StoreError("damaged")

    stream = prefetch(made(), depth)
    assert [next(stream) for _ in items] == items
    with pytest.raises(StoreError if damaged else StopIteration):
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

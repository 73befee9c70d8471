"""Hidden states in the store: the base's own, whoever computed them and whatever lay beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spec import base as base_model
from spec.base import Base
from spec.config import Model
from spec.corpus import TokenSequence
from spec.store import codecs, features
from spec.store.codecs import CODECS
from spec.store.collection import Collection
from spec.store.features import FeatureRow
from spec.store.plan import item_key, plan_groups
from spec.store.segment import DamagedError, StoreError, rows_of
from tests.tiny import HIDDEN_SIZE, VOCAB_SIZE, sequence

LIMIT = 200
BASE = {"weights": "w", "tokenizer": "t", "generation": "g"}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def half(base_folder: Path, request: pytest.FixtureRequest) -> Base:
    """The base in bfloat16, computed in either."""
    loaded = base_model.load(Model(), base_folder, "digest", torch.device("cpu"))
    return dataclasses.replace(loaded, model=loaded.model.to(getattr(torch, request.param)))


def make_rows(count: int, seed: int = 0) -> list[TokenSequence]:
    """Sequences in several buckets; every fifth has no supervised token."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length = int(generator.integers(2, 150))
        mask = generator.integers(0, 2, length) * (i % 5 > 0)
        rows.append(sequence(mask.tolist(), generator.integers(3, 290, length).tolist()))
    return rows


def key_of(row: TokenSequence) -> str:
    return item_key(row.ids, row.mask)


def made(root: Path, base: Base, codec: str = "none") -> Collection:
    dtype = str(base.dtype).removeprefix("torch.")
    collection = Collection(root, "features", features.identity(BASE, dtype, CODECS[codec]))
    collection.create()
    return collection


def missing(rows: Sequence[TokenSequence], collection: Collection) -> list[list[int]]:
    keys = [key_of(row) for row in rows]
    return plan_groups(keys, [len(row) for row in rows], collection.find(), base_model.bucket, LIMIT)


def produce(
    base: Base,
    root: Path,
    rows: Sequence[TokenSequence],
    world: int = 1,
    codec: str = "none",
    on_tokens: Callable[[int], object] = lambda count: None,
) -> Collection:
    """Fill a store as `world` workers do at the same time, each with a collection of its own."""
    collection = made(root, base, codec)
    groups = missing(rows, collection)
    items = [FeatureRow(key_of(row), row.ids, row.mask) for row in rows]
    failed: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            features.produce(base, made(root, base, codec), items, groups, CODECS[codec], on_tokens, rank, world)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(1, world)]
    for thread in threads:
        thread.start()
    work(0)
    for thread in threads:
        thread.join()
    for error in failed:
        raise error
    return collection


def stored(collection: Collection, row: TokenSequence) -> torch.Tensor:
    """The states of a row, as a reader decodes them."""
    name, number = collection.find()[key_of(row)]
    arrays, attributes = collection.read(name)
    states = CODECS[attributes["codec"]].decode(arrays, getattr(torch, attributes["dtype"]))
    return states[slice(*arrays["state_offsets"][number : number + 2])]


def digests(collection: Collection) -> dict[str, str]:
    return {name: record.digest for name, record in collection.records().items()}


def row_digests(collection: Collection) -> dict[str, str]:
    records = collection.records().values()
    return {key: found for record in records for key, found in zip(record.items, record.digests, strict=True)}


@contextlib.contextmanager
def shapes_of(base: Base) -> Iterator[list[tuple[int, int]]]:
    """The shape of the ids of every forward pass of the block."""
    shapes: list[tuple[int, int]] = []
    hook = base.model.get_decoder().register_forward_pre_hook(
        lambda model, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        hook.remove()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_those_of_the_direct_forward(base: Base, half: Base, tmp_path: Path, dtype: str) -> None:
    model = base if dtype == "float32" else half
    rows = make_rows(10)
    collection = produce(model, tmp_path, rows, codec="zstd")
    for row in rows:
        with torch.no_grad():
            direct = base_model.hidden_states(model.model, torch.from_numpy(row.ids).long()[None])[0].to(model.dtype)
        kept = [t for t in range(len(row) - 1) if row.mask[t + 1]]
        found = stored(collection, row)
        assert found.shape == (len(kept), HIDDEN_SIZE)
        assert found.dtype == direct.dtype
        tolerance = 1e-5 if dtype == "float32" else 0.05  # the padded length changes bf16's rounding
        torch.testing.assert_close(found, direct[kept], rtol=tolerance, atol=tolerance)
        if model.model.dtype == torch.bfloat16:  # padded to its own bucket, it is the same bit for bit
            width = base_model.bucket(len(row))
            padded = torch.zeros(1, width, dtype=torch.long)
            padded[0, : len(row)] = torch.from_numpy(row.ids)
            with torch.no_grad():
                alone = base_model.hidden_states(model.model, padded)[0, kept]
                assert torch.equal(found, alone.to(model.dtype))


def test_states_in_fp8_are_the_exact_ones_rounded(half: Base, tmp_path: Path) -> None:
    rows = make_rows(8)
    exact, rounded = produce(half, tmp_path, rows), produce(half, tmp_path, rows, codec="fp8")
    assert exact.folder != rounded.folder
    for row in rows:
        wanted = stored(exact, row)
        assert torch.equal(
            stored(rounded, row),
            codecs.FP8.decode(
                {key: codecs.to_numpy(tensor) for key, tensor in codecs.FP8.encode(wanted).items()}, torch.bfloat16
            ),
        )


def test_each_row_is_padded_to_its_own_bucket(base: Base, tmp_path: Path) -> None:
    """In bfloat16 the padded length changes the states, so nothing but the row may choose it."""
    rows = make_rows(12)
    with shapes_of(base) as shapes:
        produce(base, tmp_path, rows)
    padded = sorted(width for count, width in shapes for _ in range(count))
    assert padded == sorted(base_model.bucket(len(row)) for row in rows)
    assert len(set(padded)) == 3


@pytest.mark.parametrize("codec", ["none", "zstd", "fp8"])
def test_tokens_and_masks_lie_beside_the_states(base: Base, tmp_path: Path, codec: str) -> None:
    rows = make_rows(6)
    collection = produce(base, tmp_path, rows, codec=codec)
    for row in rows:
        name, number = collection.find()[key_of(row)]
        found = rows_of(*collection.read(name))[number]
        np.testing.assert_array_equal(found["ids"], row.ids, strict=True)
        np.testing.assert_array_equal(found["mask"], row.mask, strict=True)
        assert len(found["states"]) == row.mask[1:].sum()
        assert collection.verify(name).items[number] == key_of(row)
        attributes = collection.read(name)[1]
        assert attributes["producer"] == base.producer
        assert attributes["positions"] == features.POSITION_RULE


def test_any_number_of_workers_writes_the_same_segments(half: Base, tmp_path: Path) -> None:
    rows = make_rows(16)
    alone = produce(half, tmp_path / "one", rows)
    assert len(alone.records()) >= 3
    with shapes_of(half) as shapes:
        assert digests(produce(half, tmp_path / "many", rows, 3)) == digests(alone)
    assert sum(count for count, _ in shapes) == len(rows)  # each row once, by whomever


class StoppedError(Exception):
    """What ends a run in the middle."""


@pytest.mark.parametrize("after", [1, 2, 4])
def test_an_interrupted_run_ends_with_the_segments_of_an_uninterrupted_one(
    half: Base, tmp_path: Path, after: int
) -> None:
    rows = make_rows(16)
    once = produce(half, tmp_path / "once", rows)
    counts: list[int] = []

    def stop(count: int) -> None:
        counts.append(count)
        if len(counts) == after:
            raise StoppedError

    with pytest.raises(StoppedError):
        produce(half, tmp_path / "late", rows, on_tokens=stop)
    begun = set(digests(made(tmp_path / "late", half)))
    assert len(begun) < len(once.records())
    assert digests(produce(half, tmp_path / "late", rows)) == digests(once)
    assert begun <= set(digests(once))


def test_appended_and_reordered_rows_compute_nothing_again(half: Base, tmp_path: Path) -> None:
    rows, more = make_rows(8), make_rows(4, seed=1)
    before = digests(produce(half, tmp_path, rows))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with shapes_of(half) as shapes:
        after = digests(produce(half, tmp_path, [*more, *rows]))
    assert sum(count for count, _ in shapes) == len(more)
    assert before.items() < after.items()
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    everything = random.Random(0).sample([*rows, *more, *rows], 20)
    with shapes_of(half) as shapes:
        assert digests(produce(half, tmp_path, everything)) == after
    assert shapes == []


@pytest.mark.parametrize("codec", ["zstd", "fp8"])
def test_a_split_does_not_tell_how_its_segments_came_to_be(half: Base, tmp_path: Path, codec: str) -> None:
    rows, more = make_rows(8), make_rows(5, seed=1)
    split = [*rows[:3], *more, *rows[3:], rows[0]]
    fresh = produce(half, tmp_path / "fresh", split, codec=codec)
    produce(half, tmp_path / "grown", rows, codec=codec)
    grown = produce(half, tmp_path / "grown", split, codec=codec)
    assert set(grown.records()) != set(fresh.records())
    assert row_digests(grown) == row_digests(fresh)


def test_running_out_of_memory_changes_no_bit(half: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(24)
    monkeypatch.setitem(globals(), "LIMIT", 2000)
    plenty = produce(half, tmp_path / "plenty", rows)
    real, tried = base_model.hidden_states, []

    def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
        tried.append(ids.numel())
        if ids.numel() > 300:
            raise torch.OutOfMemoryError("no memory left")
        return real(model, ids)

    monkeypatch.setattr(base_model, "hidden_states", hidden_states)
    counts: list[int] = []
    assert digests(produce(half, tmp_path / "little", rows, on_tokens=counts.append)) == digests(plenty)
    assert sum(counts) == sum(map(len, rows))
    assert [size for size in tried if size > 300] == tried[:1]


@pytest.mark.parametrize("codec", ["none", "fp8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_states_that_are_no_numbers_are_never_stored(
    base_folder: Path, tmp_path: Path, value: float, codec: str
) -> None:
    broken = base_model.load(Model(), base_folder, "digest", torch.device("cpu"))
    with torch.no_grad():
        broken.embedding[299] = value  # a token that one row alone has
    good, bad = sequence([0, 1, 1, 1], [5, 6, 7, 8]), sequence([0, 0, 1, 1], [11, 299, 13, 14])
    with pytest.raises(
        StoreError, match=rf"{key_of(bad)} \(it begins with the ids \[11, 299, 13, 14\]\) is NaN or inf"
    ):
        produce(broken, tmp_path, [good, bad], codec=codec)
    assert made(tmp_path, broken, codec).find() == {}
    assert set(produce(broken, tmp_path, [good], codec=codec).find()) == {key_of(good)}


def test_the_identity_holds_what_a_state_depends_on() -> None:
    """Lossless codecs, and how answers end, are nothing to a state."""
    given = features.identity(BASE, "float32", codecs.NONE)
    assert features.identity({**BASE, "generation": "h"}, "float32", codecs.ZSTD) == given
    for field, changed in {
        "base": ({**BASE, "weights": "v"}, "float32", codecs.NONE),
        "tokenizer": ({**BASE, "tokenizer": "u"}, "float32", codecs.NONE),
        "dtype": (BASE, "bfloat16", codecs.NONE),
        "encoding": (BASE, "float32", codecs.FP8),
    }.items():
        found = features.identity(*changed)
        assert {name for name in given if given[name] != found[name]} == {field}


@pytest.mark.parametrize("codec", ["none", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_bytes_is_what_the_arrays_take(base: Base, half: Base, tmp_path: Path, dtype: str, codec: str) -> None:
    rows = make_rows(5)
    collection = produce(base if dtype == "float32" else half, tmp_path, rows, codec=codec)
    arrays = [collection.read(name)[0] for name in collection.records()]
    kept = features.offsets(CODECS[codec])
    assert kept.keys() < arrays[0].keys()
    found = sum(part[key].nbytes for part in arrays for key in kept)
    positions = sum(int(row.mask[1:].sum()) for row in rows)
    assert features.stored_bytes(positions, sum(map(len, rows)), HIDDEN_SIZE, dtype, CODECS[codec]) == found


def test_positions_of_a_segment_are_counted(base: Base, tmp_path: Path) -> None:
    rows = make_rows(9)
    collection = produce(base, tmp_path, rows)
    found = sum(features.positions_of(collection, name) for name in collection.records())
    assert found == sum(int(row.mask[1:].sum()) for row in rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tables_are_kept_once_beside_the_states(base: Base, half: Base, tmp_path: Path, dtype: str) -> None:
    model = base if dtype == "float32" else half
    collection = made(tmp_path, model)
    assert not features.has_tables(collection)
    with pytest.raises(DamagedError):
        features.load_tables(collection)
    features.save_tables(model, collection, list(map(FeatureRow.of, make_rows(3))))
    assert features.has_tables(collection)
    tables = features.load_tables(collection)
    assert tables["lm_head"].shape == tables["embedding"].shape == (VOCAB_SIZE, HIDDEN_SIZE)
    assert tables["lm_head"].dtype == getattr(torch, dtype)
    assert torch.equal(tables["lm_head"], model.lm_head.to(model.dtype))  # weights are widened, so no bit is lost
    assert torch.equal(tables["embedding"].to(model.model.dtype), model.embedding[:VOCAB_SIZE])
    assert features.tables_shape(collection) == {"hidden_size": HIDDEN_SIZE, "vocab_size": VOCAB_SIZE}
    assert features.logits(collection) == base_model.PLAIN
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    features.save_tables(model, collection, list(map(FeatureRow.of, make_rows(3))))
    times.pop(collection.folder)  # locks come and go in it
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert collection.verify(next(iter(collection.records()))).items == ("tables",)

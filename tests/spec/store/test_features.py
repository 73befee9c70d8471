"""Hidden states in the store: the base's own, whoever computed them and whatever lay beside them."""

import dataclasses
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spec import base as base_model
from spec.base import Base
from spec.config import Model
from spec.corpus import TokenSequence
from spec.heads import LAST, Tap
from spec.store import codecs, features, identity, tables
from spec.store.codecs import CODECS
from spec.store.collection import Claim, Collection
from spec.store.features import FeatureRow, TapStore
from spec.store.plan import item_key
from spec.store.segment import DamagedError, StoreError, rows_of
from tests.tiny import HIDDEN_SIZE, TAPS, VOCAB_SIZE, at_once, digests, row_digests, sequence, shapes_of

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


def made(root: Path, base: Base, codec: str = "none", taps: Sequence[Tap] = (LAST,)) -> list[TapStore]:
    dtype, computed = (str(each).removeprefix("torch.") for each in (base.dtype, base.model.dtype))
    stores = []
    for tap in taps:
        content = identity.states(BASE, dtype, tap, CODECS[codec], computed)
        stores.append(TapStore(tap, CODECS[codec], Collection(root, "states", content)))
        stores[-1].collection.create()
    return stores


def produce(
    base: Base,
    root: Path,
    rows: Sequence[TokenSequence],
    world: int = 1,
    codec: str = "none",
    on_tokens: Callable[[int], object] = lambda count: None,
    taps: Sequence[Tap] = (LAST,),
) -> Collection:
    """Fill a store as `world` workers do at the same time, each with collections of its own; that of the first tap."""
    stores = made(root, base, codec, taps)
    items = [FeatureRow(key_of(row), row.ids, row.mask) for row in rows]
    groups = features.plan(items, [store.collection.find() for store in stores], LIMIT)

    def work(rank: int) -> None:
        features.produce(base, made(root, base, codec, taps), items, groups, on_tokens, rank, world)

    at_once(work, world)
    return stores[0].collection


def stored(collection: Collection, row: TokenSequence) -> torch.Tensor:
    """The states of a row, as a reader decodes them."""
    name, number = collection.find()[key_of(row)]
    arrays, attributes = collection.read(name)
    states = CODECS[attributes["codec"]].decode(arrays, getattr(torch, attributes["dtype"]))
    return states[slice(*arrays["state_offsets"][number : number + 2])]


@pytest.mark.parametrize(("dtype", "codec"), [("float32", "zstd"), ("bfloat16", "none"), ("bfloat16", "zstd")])
def test_states_are_those_of_the_direct_forward_and_lie_with_their_tokens(
    base: Base, half: Base, tmp_path: Path, dtype: str, codec: str
) -> None:
    model = base if dtype == "float32" else half
    rows = make_rows(10)
    collection = produce(model, tmp_path, rows, codec=codec)
    for row in rows:
        with torch.no_grad():
            direct = base_model.hidden_states(model.model, torch.from_numpy(row.ids).long()[None])[0].to(model.dtype)
        kept = [t for t in range(len(row) - 1) if row.mask[t + 1]]
        states = stored(collection, row)
        assert (states.shape, states.dtype) == ((len(kept), HIDDEN_SIZE), direct.dtype)
        tolerance = 1e-5 if dtype == "float32" else 0.05  # the padded length changes bf16's rounding
        torch.testing.assert_close(states, direct[kept], rtol=tolerance, atol=tolerance)
        name, number = collection.find()[key_of(row)]
        arrays, attributes = collection.read(name)
        found = rows_of(arrays, attributes)[number]
        np.testing.assert_array_equal(found["ids"], row.ids, strict=True)
        np.testing.assert_array_equal(found["mask"], row.mask, strict=True)
        assert collection.verify(name).items[number] == key_of(row)
        assert (attributes["producer"], attributes["width"]) == (model.producer, HIDDEN_SIZE)


def test_states_in_fp8_are_the_exact_ones_rounded(half: Base, tmp_path: Path) -> None:
    rows = make_rows(8)
    exact, rounded = produce(half, tmp_path, rows), produce(half, tmp_path, rows, codec="fp8")
    assert exact.folder != rounded.folder
    for row in rows:
        kept = {key: codecs.to_numpy(tensor) for key, tensor in codecs.FP8.encode(stored(exact, row)).items()}
        assert torch.equal(stored(rounded, row), codecs.FP8.decode(kept, torch.bfloat16))


def test_each_row_is_padded_to_its_own_bucket(base: Base, tmp_path: Path) -> None:
    """In bfloat16 the padded length changes the states, so nothing but the row may choose it."""
    rows = make_rows(12)
    with shapes_of(base) as shapes:
        produce(base, tmp_path, rows)
    padded = sorted(width for count, width in shapes for _ in range(count))
    assert padded == sorted(base_model.bucket(len(row)) for row in rows)
    assert len(set(padded)) == 3


def test_rows_appended_and_reordered_compute_nothing_again(half: Base, tmp_path: Path) -> None:
    rows, more = make_rows(8), make_rows(4, seed=1)
    before = digests(produce(half, tmp_path / "grown", rows))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with shapes_of(half) as shapes:
        grown = produce(half, tmp_path / "grown", [*more, *rows])
    assert sum(count for count, _ in shapes) == len(more)
    assert before.items() < digests(grown).items()
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    everything = random.Random(0).sample([*rows, *more, *rows], 20)
    with shapes_of(half) as shapes:
        assert digests(produce(half, tmp_path / "grown", everything)) == digests(grown)
    assert shapes == []
    fresh = produce(half, tmp_path / "fresh", everything)
    assert set(grown.records()) != set(fresh.records())
    assert row_digests(grown) == row_digests(fresh)


def test_running_out_of_memory_changes_no_bit(half: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(24)
    monkeypatch.setitem(globals(), "LIMIT", 2000)
    plenty = produce(half, tmp_path / "plenty", rows)
    real, tried = base_model.read_taps, []

    def read_taps(model: Any, ids: torch.Tensor, taps: Sequence[Tap]) -> dict[Tap, torch.Tensor]:
        tried.append(ids.numel())
        if ids.numel() > 300:
            raise torch.OutOfMemoryError("no memory left")
        return real(model, ids, taps)

    monkeypatch.setattr(base_model, "read_taps", read_taps)
    counts: list[int] = []
    assert digests(produce(half, tmp_path / "little", rows, on_tokens=counts.append)) == digests(plenty)
    assert sum(counts) == sum(map(len, rows))
    assert [size for size in tried if size > 300] == tried[:1]


@pytest.mark.parametrize(("value", "codec"), [("nan", "none"), ("inf", "fp8"), ("-inf", "none")])
def test_states_that_are_no_numbers_are_never_stored(base_folder: Path, tmp_path: Path, value: str, codec: str) -> None:
    broken = base_model.load(Model(), base_folder, "digest", torch.device("cpu"))
    with torch.no_grad():
        broken.embedding[299] = float(value)  # a token that one row alone has
    good, bad = sequence([0, 1, 1, 1], [5, 6, 7, 8]), sequence([0, 0, 1, 1], [11, 299, 13, 14])
    with pytest.raises(StoreError, match=rf"{key_of(bad)} \(it begins with the ids \[11, 299, 13, 14\]\) is NaN or"):
        produce(broken, tmp_path, [good, bad], codec=codec)
    assert made(tmp_path, broken, codec)[0].collection.find() == {}
    assert set(produce(broken, tmp_path, [good], codec=codec).find()) == {key_of(good)}


def test_every_tap_of_a_sequence_comes_from_one_forward(half: Base, tmp_path: Path) -> None:
    rows = make_rows(8)
    with shapes_of(half) as shapes:
        produce(half, tmp_path, rows, codec="zstd", taps=TAPS)
    assert sum(count for count, _ in shapes) == len(rows)
    stores = made(tmp_path, half, "zstd", TAPS)
    for row in rows:
        ids = torch.zeros(1, base_model.bucket(len(row)), dtype=torch.long)
        ids[0, : len(row)] = torch.from_numpy(row.ids)
        with torch.no_grad():
            expected = base_model.read_taps(half.model, ids, TAPS)
        for store in stores:
            kept = features.kept_positions(row.mask, store.tap)
            assert len(kept) == (len(row) if store.tap.positions == "all" else row.mask[1:].sum())
            assert torch.equal(stored(store.collection, row), expected[store.tap][0, kept].to(half.dtype))


def test_only_taps_that_the_store_lacks_are_computed(half: Base, tmp_path: Path) -> None:
    """Changing the taps computes the new ones alone, changing them back computes nothing."""
    rows, more = make_rows(8), make_rows(4, seed=1)
    before = digests(produce(half, tmp_path, rows))
    produce(half, tmp_path, more, taps=TAPS[1:2])
    with shapes_of(half) as shapes:
        last = produce(half, tmp_path, [*rows, *more], taps=TAPS)
    assert sum(count for count, _ in shapes) == len(rows) + len(more)  # all of them lack the third tap
    assert before.items() < digests(last).items()
    for store in made(tmp_path, half, taps=TAPS):
        assert store.collection.find().keys() == {key_of(row) for row in [*rows, *more]}
        alone = produce(half, tmp_path / "alone", [*rows, *more], taps=(store.tap,))
        assert row_digests(store.collection) == row_digests(alone)
    with shapes_of(half) as shapes:
        for taps in (TAPS[:1], TAPS[::-1]):
            produce(half, tmp_path, [*more, *rows], taps=taps)
    assert shapes == []


def test_sequences_that_lack_the_same_taps_share_a_group() -> None:
    rows = [FeatureRow(f"{number}", np.zeros(40, np.int32), np.ones(40, np.uint8)) for number in range(6)]
    rows.append(FeatureRow("long", np.zeros(100, np.int32), np.ones(100, np.uint8)))
    groups = features.plan(rows, [{"0", "1", "4"}, {"1", "2", "long"}], 80)
    assert groups == [([6], (0,)), ([0, 4], (1,)), ([2], (0,)), ([3, 5], (0, 1))]


def test_workers_and_stages_share_several_taps(half: Base, tmp_path: Path) -> None:
    """Two workers with all taps and one of another run with some of them: nobody waits for ever."""
    rows = make_rows(16)
    alone = [digests(produce(half, tmp_path / f"{n}", rows, taps=(tap,))) for n, tap in enumerate(TAPS)]
    other = threading.Thread(target=produce, args=(half, tmp_path / "many", rows), kwargs={"taps": TAPS[:0:-1]})
    other.start()
    produce(half, tmp_path / "many", rows, 2, taps=TAPS)
    other.join(30)
    assert not other.is_alive()
    for store, expected in zip(made(tmp_path / "many", half, taps=TAPS), alone, strict=True):
        assert digests(store.collection) == expected
        assert list(store.collection.folder.glob(".lock-*")) == []


def test_what_a_stopped_run_committed_is_kept(half: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, real, written = make_rows(12), Claim.commit, []

    def commit(self: Claim, *arguments: Any) -> Any:
        if len(written) == 2:
            raise InterruptedError
        written.append(self.collection.folder)
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Claim, "commit", commit)
        with pytest.raises(InterruptedError):
            produce(half, tmp_path / "late", rows, taps=TAPS)
    begun = [digests(store.collection) for store in made(tmp_path / "late", half, taps=TAPS)]
    assert sum(map(len, begun)) == 2
    for name in ("late", "once"):
        produce(half, tmp_path / name, rows, taps=TAPS)
    for before, late, once in zip(begun, *(made(tmp_path / n, half, taps=TAPS) for n in ("late", "once")), strict=True):
        assert before.items() <= digests(late.collection).items()
        assert row_digests(late.collection) == row_digests(once.collection)


def test_the_identity_holds_what_a_state_depends_on() -> None:
    """Lossless codecs, and how answers end, are nothing to a state."""
    values: dict[str, Any] = {"base": BASE, "dtype": "bfloat16", "tap": LAST, "codec": codecs.NONE}
    values["arithmetic"] = "bfloat16"
    given = identity.states(**values)
    assert identity.states(**{**values, "base": {**BASE, "generation": "h"}, "codec": codecs.ZSTD}) == given
    for field, changed in {
        "base": {"base": {**BASE, "weights": "v"}},
        "tokenizer": {"base": {**BASE, "tokenizer": "u"}},
        "dtype": {"dtype": "float32"},
        "layer": {"tap": Tap(0)},
        "positions": {"tap": Tap(positions="all")},
        "encoding": {"codec": codecs.FP8},
        "arithmetic": {"arithmetic": "float32"},
    }.items():
        found = identity.states(**{**values, **changed})
        assert {name for name in given if given[name] != found[name]} == {field}
        assert identity.tap_of(found) == changed.get("tap", LAST)


@pytest.mark.parametrize("codec", ["none", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_bytes_is_what_the_arrays_take(base: Base, half: Base, tmp_path: Path, dtype: str, codec: str) -> None:
    rows = make_rows(5)
    collection = produce(base if dtype == "float32" else half, tmp_path, rows, codec=codec)
    arrays = [collection.read(name)[0] for name in collection.records()]
    kept = features.offsets(CODECS[codec])
    assert kept.keys() < arrays[0].keys()
    found = sum(part[key].nbytes for part in arrays for key in kept)
    store = TapStore(LAST, CODECS[codec], collection)
    states = store.position_bytes(list(map(FeatureRow.of, rows)), HIDDEN_SIZE, dtype)
    assert states + 5 * sum(map(len, rows)) == found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tables_are_kept_once(base: Base, half: Base, tmp_path: Path, dtype: str) -> None:
    model = base if dtype == "float32" else half
    collection, rows = tables.collection(tmp_path, BASE, dtype), [row.ids for row in make_rows(3)]
    collection.create()
    with pytest.raises(DamagedError):
        tables.Tables(collection)
    tables.save(model, collection, rows)
    found = tables.Tables(collection)
    assert found["lm_head"].shape == found["embedding"].shape == (VOCAB_SIZE, HIDDEN_SIZE)
    assert found["lm_head"].dtype == getattr(torch, dtype)
    assert torch.equal(found["lm_head"], model.lm_head.to(model.dtype))  # weights are widened, so no bit is lost
    assert torch.equal(found["embedding"].to(model.model.dtype), model.embedding[:VOCAB_SIZE])
    shape = {"dtype": dtype, "hidden_size": HIDDEN_SIZE, "vocab_size": VOCAB_SIZE, "layers": 2}
    assert tables.shape(collection) == shape | {"layer": base_model.layer_of(model.model).model_dump()}
    assert found.keys() == {"embedding", "lm_head"} | base_model.last_layer(model.model).keys()
    assert tables.logits(collection) == base_model.PLAIN
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    tables.save(model, collection, rows)
    times.pop(collection.folder)  # locks come and go in it
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert collection.verify(next(iter(collection.records()))).items == ("tables",)

"""Hidden states in the store: the base's own, whoever computed them and whatever lay beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spec import base as base_model
from spec.base import Base
from spec.config import Model
from spec.corpus import TokenSequence
from spec.store import features
from spec.store.collection import Collection, item_key, plan
from spec.store.segment import StoreError
from tests.tiny import HIDDEN_SIZE, VOCAB_SIZE, sequence

LIMIT = 200
IDENTITY = features.identity({"weights": "w", "tokenizer": "t"}, "float32")


@pytest.fixture(scope="module")
def half(base_folder: Path) -> Base:
    """The base in bfloat16."""
    return base_model.load(Model(), base_folder, "digest", torch.device("cpu"))


def make_rows(count: int, seed: int = 0) -> list[TokenSequence]:
    """Sequences in several buckets; every fifth has no supervised token."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length = int(generator.integers(2, 150))
        mask = generator.integers(0, 2, length) * (i % 5 > 0)
        rows.append(sequence(mask.tolist(), generator.integers(3, 290, length).tolist()))
    return rows


def keys_of(rows: Sequence[TokenSequence]) -> list[str]:
    return [item_key(row.ids, row.mask) for row in rows]


def groups_of(rows: Sequence[TokenSequence], collection: Collection) -> list[list[int]]:
    return plan(keys_of(rows), [len(row) for row in rows], collection.find(), base_model.bucket, LIMIT)


def produce(
    base: Base, root: Path, rows: Sequence[TokenSequence], world: int = 1, codec: str = "none", skip: int = 0
) -> Collection:
    """Fill a store as `world` workers do, each with its share of the groups; the first `skip` groups are left out."""
    collection = Collection(root, "features", IDENTITY)
    collection.create()
    groups = groups_of(rows, collection)[skip:]
    items = [(key, row.ids, row.mask) for key, row in zip(keys_of(rows), rows, strict=True)]
    for rank in range(world):
        features.produce(base, Collection(root, "features", IDENTITY), items, groups[rank::world], codec)
    return collection


def stored(collection: Collection, row: TokenSequence) -> torch.Tensor:
    """The states of a row, as the store holds them."""
    name, number = collection.find()[item_key(row.ids, row.mask)]
    arrays = collection.read(name)
    start, stop = arrays["state_offsets"][number : number + 2]
    states = torch.from_numpy(arrays["states"][start:stop])
    return states if states.dtype == torch.float32 else states.view(torch.bfloat16)


def digests(collection: Collection) -> dict[str, str]:
    return {name: record.digest for name, record in collection.records().items()}


@given(st.lists(st.integers(0, 1), min_size=1, max_size=20))
def test_kept_positions_lead_to_supervised_tokens(mask: list[int]) -> None:
    expected = [t for t in range(len(mask) - 1) if mask[t + 1]]
    assert features.kept_positions(np.asarray(mask, np.uint8)).tolist() == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_those_of_the_direct_forward(base: Base, half: Base, tmp_path: Path, dtype: str) -> None:
    model = base if dtype == "float32" else half
    rows = make_rows(10)
    collection = produce(model, tmp_path, rows)
    for row in rows:
        with torch.no_grad():
            direct = base_model.hidden_states(model.model, torch.from_numpy(row.ids).long()[None])[0]
        kept = [t for t in range(len(row) - 1) if row.mask[t + 1]]
        found = stored(collection, row)
        assert found.shape == (len(kept), HIDDEN_SIZE)
        assert found.dtype == direct.dtype
        tolerance = 1e-5 if dtype == "float32" else 0.05  # the padded length changes bf16's rounding
        torch.testing.assert_close(found, direct[kept], rtol=tolerance, atol=tolerance)
        if dtype == "bfloat16":  # padded to its own bucket, and nothing else, it is the same bit for bit
            width = base_model.bucket(len(row))
            padded = torch.zeros(1, width, dtype=torch.long)
            padded[0, : len(row)] = torch.from_numpy(row.ids)
            with torch.no_grad():
                assert torch.equal(found, base_model.hidden_states(model.model, padded)[0, kept])


def test_each_row_is_padded_to_its_own_bucket(base: Base, tmp_path: Path) -> None:
    """In bfloat16 the padded length changes the states, so nothing but the row may choose it."""
    shapes: list[tuple[int, int]] = []
    hook = base.model.get_decoder().register_forward_pre_hook(
        lambda model, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    rows = make_rows(12)
    try:
        produce(base, tmp_path, rows)
    finally:
        hook.remove()
    padded = sorted(width for count, width in shapes for _ in range(count))
    assert padded == sorted(base_model.bucket(len(row)) for row in rows)
    assert len(set(padded)) == 3


def test_tokens_and_masks_lie_beside_the_states(base: Base, tmp_path: Path) -> None:
    rows = make_rows(6)
    collection = produce(base, tmp_path, rows)
    for row in rows:
        name, number = collection.find()[item_key(row.ids, row.mask)]
        arrays = collection.read(name)
        tokens = slice(*arrays["token_offsets"][number : number + 2])
        np.testing.assert_array_equal(arrays["ids"][tokens], row.ids, strict=True)
        np.testing.assert_array_equal(arrays["mask"][tokens], row.mask, strict=True)


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_workers_writes_the_same_segments(half: Base, tmp_path: Path, world: int) -> None:
    rows = make_rows(12)
    alone = produce(half, tmp_path / "one", rows)
    assert len(alone.records()) >= world
    assert digests(produce(half, tmp_path / "many", rows, world)) == digests(alone)


def test_an_interrupted_run_ends_with_the_segments_of_an_uninterrupted_one(half: Base, tmp_path: Path) -> None:
    rows = make_rows(12)
    produce(half, tmp_path / "late", rows, skip=2)  # as if the worker of the first groups had died
    late = produce(half, tmp_path / "late", rows)
    assert digests(late) == digests(produce(half, tmp_path / "once", rows))


def test_appended_rows_add_segments_and_touch_none(half: Base, tmp_path: Path) -> None:
    rows = make_rows(8)
    before = digests(produce(half, tmp_path, rows))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    more = make_rows(4, seed=1)
    after = digests(produce(half, tmp_path, more + rows))
    assert before.items() < after.items()
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert digests(produce(half, tmp_path, rows[::-1] + more)) == after


def test_the_batch_changes_no_bit(half: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(8)
    together = produce(half, tmp_path / "together", rows)
    monkeypatch.setattr(features, "BATCH_TOKENS", 1)
    assert digests(produce(half, tmp_path / "one by one", rows)) == digests(together)


def test_the_codec_changes_no_content(base: Base, tmp_path: Path) -> None:
    rows = make_rows(4)
    plain, packed = (produce(base, tmp_path / codec, rows, codec=codec) for codec in ("none", "zstd"))
    assert digests(plain) == digests(packed)


def test_progress_counts_every_token(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "BATCH_TOKENS", 128)
    rows = make_rows(8)
    collection = Collection(tmp_path, "features", IDENTITY)
    collection.create()
    counts: list[int] = []
    items = [(key, row.ids, row.mask) for key, row in zip(keys_of(rows), rows, strict=True)]
    features.produce(base, collection, items, groups_of(rows, collection), "none", counts.append)
    assert sum(counts) == sum(map(len, rows))
    assert len(counts) > 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_no_numbers_are_never_stored(base_folder: Path, tmp_path: Path, value: float) -> None:
    broken = base_model.load(Model(), base_folder, "digest", torch.device("cpu"))
    with torch.no_grad():
        broken.embedding[299] = value  # a token that one row alone has
    good, bad = sequence([0, 1, 1, 1], [5, 6, 7, 8]), sequence([0, 0, 1, 1], [11, 299, 13, 14])
    with pytest.raises(StoreError, match=r"begins with the ids \[11, 299, 13, 14\] is NaN or infinite"):
        produce(broken, tmp_path, [good, bad])
    assert Collection(tmp_path, "features", IDENTITY).find() == {}
    assert set(produce(broken, tmp_path, [good]).find()) == set(keys_of([good]))


@pytest.mark.parametrize(("digests_of", "dtype"), [(("v", "t"), "float32"), (("w", "u"), "float32"), (("w", "t"), "x")])
def test_identity_holds_base_tokenizer_and_dtype(digests_of: tuple[str, str], dtype: str) -> None:
    weights, tokenizer = digests_of
    assert features.identity({"weights": weights, "tokenizer": tokenizer}, dtype) != IDENTITY


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_bytes_is_what_the_arrays_take(base: Base, half: Base, tmp_path: Path, dtype: str) -> None:
    rows = make_rows(5)
    collection = produce(base if dtype == "float32" else half, tmp_path, rows)
    arrays = [collection.read(name) for name in collection.records()]
    found = sum(part[key].nbytes for part in arrays for key in ("states", "ids", "mask"))
    positions = sum(int(row.mask[1:].sum()) for row in rows)
    assert features.stored_bytes(positions, sum(map(len, rows)), HIDDEN_SIZE, dtype) == found


def test_tables_are_kept_once_beside_the_states(base: Base, tmp_path: Path) -> None:
    collection = Collection(tmp_path, "features", IDENTITY)
    collection.create()
    features.save_tables(base, collection)
    tables = features.load_tables(collection)
    assert tables["lm_head"].shape == tables["embedding"].shape == (VOCAB_SIZE, HIDDEN_SIZE)
    assert torch.equal(tables["lm_head"], base.lm_head)
    assert torch.equal(tables["embedding"], base.embedding)
    before = (collection.folder / features.TABLES).stat().st_mtime_ns
    features.save_tables(base, collection)
    assert (collection.folder / features.TABLES).stat().st_mtime_ns == before
    assert collection.find() == {}

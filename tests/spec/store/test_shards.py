"""One array as one shard: the same bytes as zarr-python's own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spec.store import codecs, shards
from spec.store.shards import Pieces

DTYPES = [np.uint8, np.uint16, np.int32, np.int64, np.float32]


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@st.composite
def pieces(draw: st.DrawFn) -> Pieces:
    """Arrays in pieces, of few values or of many, which compress well or not at all."""
    dtype, width = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    lengths = draw(st.lists(st.sampled_from([0, 0, 1, 2, 7, 8, 9, 30, 100]), min_size=1, max_size=6))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    top = draw(st.sampled_from([1, 2, 200]))
    return Pieces([generator.integers(0, top, (length, *width)).astype(dtype) for length in lengths])


def whole(array: Pieces) -> NDArray[Any]:
    return np.concatenate(array.parts)


@given(array=pieces(), data=st.data())
def test_rows_are_those_of_the_joined_array_and_zeros_past_the_end(array: Pieces, data: st.DataObject) -> None:
    joined = whole(array)
    assert (array.shape, array.dtype, array.ends[-1]) == (joined.shape, joined.dtype, len(joined))
    start = data.draw(st.integers(0, len(joined)))
    stop = data.draw(st.integers(start, len(joined) + 20))
    expected = np.zeros((stop - start, *joined.shape[1:]), joined.dtype)
    expected[: len(joined[start:stop])] = joined[start:stop]
    np.testing.assert_array_equal(array.rows(start, stop), expected, strict=True)


@settings(max_examples=80)
@given(
    array=pieces(),
    codec=st.sampled_from(["none", "zstd", "fp8"]),
    chunk=st.sampled_from([1, 8, 24, 64, 100, 2**20]),
)
def test_a_shard_is_byte_for_byte_zarrs(
    tmp_path_factory: pytest.TempPathFactory, pool: Executor, array: Pieces, codec: str, chunk: int
) -> None:
    folder, joined = tmp_path_factory.mktemp("shard"), whole(array)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "_CHUNK_BYTES", chunk)
        shards.create(zarr.create_group(folder / "ours"), "a", array, codec)
        ours = folder / "ours" / "a"
        path = ours.joinpath("c", *"0" * joined.ndim)
        if len(joined):
            shards.write(path, array, codec, pool)
    made = zarr.open_array(ours, mode="r")
    theirs = zarr.create_group(folder / "theirs").create_array(
        "a",
        shape=joined.shape,
        dtype=joined.dtype,
        chunks=made.chunks,
        shards=made.shards,
        compressors=codecs.compressors(codec, joined.dtype),
        config={"write_empty_chunks": True},
    )
    theirs[...] = joined
    files = sorted(file.relative_to(folder / "theirs") for file in (folder / "theirs").rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(folder / "ours") for file in (folder / "ours").rglob("*") if file.is_file())
    assert path.is_file() == bool(len(joined))
    for file in files:
        assert (folder / "ours" / file).read_bytes() == (folder / "theirs" / file).read_bytes()
    np.testing.assert_array_equal(made[...], joined, strict=True)
    if len(joined):
        codecs.check_shard(path, made.shards[0] // made.chunks[0])


@settings(max_examples=60)
@given(data=st.data(), codec=st.sampled_from(["none", "zstd"]))
def test_any_flipped_bit_of_a_shard_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, pool: Executor, data: st.DataObject, codec: str
) -> None:
    path = tmp_path_factory.mktemp("shard") / "c" / "0"
    array = Pieces([np.arange(100, dtype=np.int32)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "_CHUNK_BYTES", 64)
        shards.write(path, array, codec, pool)
    codecs.check_shard(path, 7)
    content = path.read_bytes()
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=20)):
        flipped = bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))])
        path.write_bytes(content[:at] + flipped + content[at + 1 :])
        with pytest.raises((ValueError, OSError)):
            codecs.check_shard(path, 7)
    for cut in (b"", content[:-1], content + b"\0", content[1:]):
        path.write_bytes(cut)
        with pytest.raises((ValueError, OSError)):
            codecs.check_shard(path, 7)


def test_the_number_of_threads_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "_CHUNK_BYTES", 512)
    array = Pieces([np.random.default_rng(0).integers(0, 9, (500, 3), np.uint16) for _ in range(7)])
    for threads in (1, 4):
        with ThreadPoolExecutor(threads) as pool:
            shards.write(tmp_path / f"{threads}" / "c", array, "zstd", pool)
    assert (tmp_path / "1" / "c").read_bytes() == (tmp_path / "4" / "c").read_bytes()


def test_an_error_while_encoding_is_raised(tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise MemoryError("no memory left")

    monkeypatch.setattr(shards, "_encode", fail)
    with pytest.raises(MemoryError, match="no memory left"):
        shards.write(tmp_path / "c" / "0", Pieces([np.zeros(3, np.int32)]), "none", pool)

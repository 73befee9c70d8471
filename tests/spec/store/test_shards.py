"""One array as one shard: the same bytes as zarr-python's own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spec.store import codecs, shards
from spec.store.codecs import CODECS, Codec
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


@settings(max_examples=80)
@given(
    array=pieces(),
    codec=st.sampled_from(list(CODECS.values())),
    chunk=st.sampled_from([1, 8, 24, 64, 100, 2**20]),
)
def test_a_shard_is_byte_for_byte_zarrs(
    tmp_path_factory: pytest.TempPathFactory, pool: Executor, array: Pieces, codec: Codec, chunk: int
) -> None:
    folder, joined = tmp_path_factory.mktemp("shard"), whole(array)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "_CHUNK_BYTES", chunk)
        shards.save(zarr.create_group(folder / "ours"), folder / "ours", "a", array, codec, pool)
    ours = folder / "ours" / "a"
    path = shards.path_of(ours, joined.ndim)
    made = zarr.open_array(ours, mode="r")
    theirs = zarr.create_group(folder / "theirs").create_array(
        "a",
        shape=joined.shape,
        dtype=joined.dtype,
        chunks=made.chunks,
        shards=made.shards,
        compressors=codec.compressors(joined.dtype),
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

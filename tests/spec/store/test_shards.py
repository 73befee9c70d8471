"""One array as one shard: the same bytes as zarr-python's own."""

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

from spec.store import shards
from spec.store.codecs import CODECS, Codec

DTYPES = [np.uint8, np.uint16, np.int32, np.int64, np.float32]


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@st.composite
def arrays(draw: st.DrawFn) -> NDArray[Any]:
    """Of few values or of many, which compress well or not at all."""
    dtype, width = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    length, top = draw(st.sampled_from([0, 1, 2, 7, 8, 9, 30, 100, 399])), draw(st.sampled_from([1, 2, 200]))
    return np.random.default_rng(draw(st.integers(0, 99))).integers(0, top, (length, *width)).astype(dtype)


@settings(max_examples=80)
@given(array=arrays(), codec=st.sampled_from([*CODECS.values()]), chunk=st.sampled_from([1, 8, 24, 64, 100, 2**20]))
def test_a_shard_is_byte_for_byte_zarrs(
    tmp_path_factory: pytest.TempPathFactory, pool: Executor, array: NDArray[Any], codec: Codec, chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("shard")
    assert shards._CHUNK_BYTES == 2**20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_CHUNK_BYTES", chunk)
        shards.save(zarr.create_group(folder / "ours"), folder / "ours", "a", array, codec, pool)
    made = zarr.open_array(folder / "ours" / "a", mode="r")
    assert made.chunks[0] == (min(max(chunk // array[:1].nbytes, 1), len(array)) if len(array) else 1)
    theirs = zarr.create_group(folder / "theirs").create_array(
        "a",
        shape=array.shape,
        dtype=array.dtype,
        chunks=made.chunks,
        shards=made.shards,
        compressors=codec.compressors(array.dtype),
        config={"write_empty_chunks": True},
    )
    theirs[...] = array
    ours, zarrs = (
        {path.relative_to(folder / name): path.read_bytes() for path in (folder / name).rglob("*") if path.is_file()}
        for name in ("ours", "theirs")
    )
    assert ours == zarrs
    assert Path("a", "c", *"0" * array.ndim) in ours or not len(array)
    np.testing.assert_array_equal(made[...], array, strict=True)
    shards.check(folder / "ours", "a", made)

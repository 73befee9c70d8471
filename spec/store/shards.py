"""Encoding of one array as one Zarr shard, in threads.

zarr-python writes the same bytes, at a third of the speed (docs/store.md): it hands every chunk from thread to thread
for every codec. The layout is that of Zarr's sharding codec
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/): chunks one after the other, then the
offset and length of each as little-endian uint64, then a crc32c of that index. Tests compare it with zarr-python's.
"""

import os
from collections.abc import Iterable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray

from spec.store.codecs import Codec

_CHUNK_BYTES = 2**20  # about as many in each chunk: it compresses well, and stays in a processor's cache
_RESIDUE = 0x48674BC7  # the crc32c of anything that ends in its own


def save(group: zarr.Group, folder: Path, key: str, array: NDArray[Any], codec: Codec, pool: Executor) -> None:
    """Add an array of one shard, whose chunks `pool` encodes, to the group in a folder; an empty one has no shard."""
    rows, width = max(len(array), 1), array.shape[1:]
    chunk = min(max(_CHUNK_BYTES // (array.itemsize * int(np.prod(width))), 1), rows)
    count = -(-rows // chunk)
    group.create_array(
        key,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(chunk, *width),
        shards=(chunk * count, *width),
        compressors=codec.compressors(array.dtype),
    )
    if len(array):

        def encode(start: int) -> bytes:
            part = array[start : start + chunk]
            if len(part) < chunk:
                part = np.concatenate([part, np.zeros((chunk - len(part), *width), array.dtype)])
            return _with_crc(codec.compress(part.astype(part.dtype.newbyteorder("<"), copy=False)))

        _write(_path_of(folder / key, array.ndim), pool.map(encode, range(0, rows, chunk)), count)


def check(folder: Path, key: str, array: zarr.Array) -> None:
    """Check the crc32c of each chunk and of the index at the end: zarrs passes over them where an array ends within a
    shard, as nearly all do. An OSError or a ValueError says that the shard is missing or damaged."""
    if not array.shape[0]:
        return
    chunks = array.shards[0] // array.chunks[0]
    with _path_of(folder / key, array.ndim).open("rb", buffering=0) as file:
        buffer = np.empty(file.seek(0, os.SEEK_END), np.uint8)

        def checked(start: int, size: int) -> NDArray[np.uint8]:
            file.seek(start)
            part = buffer[: file.readinto(buffer.data[:size])]
            if len(part) != size or google_crc32c.value(part) != _RESIDUE:
                raise ValueError("a checksum is wrong")
            return part[:-4]

        index = checked(len(buffer) - 16 * chunks - 4, 16 * chunks + 4)
        for start, size in index.view("<u8").reshape(-1, 2).tolist():
            checked(start, size)


def _path_of(array: Path, ndim: int) -> Path:
    """The file of an array's one shard."""
    return array.joinpath("c", *"0" * ndim)


def _write(path: Path, chunks: Iterable[bytes], count: int) -> None:
    path.parent.mkdir(parents=True)
    index = np.empty((count, 2), "<u8")
    with path.open("wb") as file:
        for number, content in enumerate(chunks):
            index[number] = file.tell(), len(content)
            file.write(content)
        file.write(_with_crc(index.tobytes()))


def _with_crc(content: bytes) -> bytes:
    return content + int(google_crc32c.value(content)).to_bytes(4, "little")

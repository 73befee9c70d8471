"""Encoding of one array as one Zarr shard, in threads.

zarr-python writes the same bytes, at a third of the speed (docs/store.md): it hands every chunk from thread to thread
for every codec. The layout is that of Zarr's sharding codec
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/): chunks one after the other, then the
offset and length of each as little-endian uint64, then a crc32c of that index. Tests compare it with zarr-python's.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray

from spec.store import codecs
from spec.store.codecs import Codec


@dataclass(frozen=True)
class Pieces:
    """An array in pieces along its first axis, which are joined a chunk at a time."""

    parts: Sequence[NDArray[Any]]

    @cached_property
    def ends(self) -> list[int]:
        """Where each piece ends."""
        ends: list[int] = np.cumsum([len(part) for part in self.parts]).tolist()
        return ends

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        return (self.ends[-1], *self.parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of every piece."""
        return self.parts[0].dtype

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """The rows from start to stop, zeros past the end."""
        found = [self.parts[0][:0]]
        number = bisect.bisect_right(self.ends, start)
        while start < min(stop, self.ends[-1]):
            end = self.ends[number]
            offset = end - len(self.parts[number])
            found.append(self.parts[number][start - offset : stop - offset])
            start, number = end, number + 1
        left = max(stop - max(start, self.ends[-1]), 0)
        if left:
            found.append(np.zeros((left, *self.shape[1:]), self.dtype))
        return np.concatenate(found)


def save(group: zarr.Group, folder: Path, key: str, array: Pieces, codec: Codec, pool: Executor) -> None:
    """Add an array of one shard to a group.

    Args:
        group: the group.
        folder: where it lies.
        key: the array's name.
        array: all of it; an empty one has no shard.
        codec: of its bytes; what it makes of numbers is done before.
        pool: encodes chunks.
    """
    rows = max(array.shape[0], 1)
    chunk = min(codecs.chunk_rows(array.shape, array.dtype), rows)
    count = -(-rows // chunk)
    group.create_array(
        key,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(chunk, *array.shape[1:]),
        shards=(chunk * count, *array.shape[1:]),
        compressors=codec.compressors(array.dtype),
    )
    if all(array.shape):

        def encode(start: int) -> bytes:
            part = array.rows(start, start + chunk)
            return _with_crc(codec.compress(part.astype(part.dtype.newbyteorder("<"), copy=False)))

        _write(path_of(folder / key, len(array.shape)), pool.map(encode, range(0, rows, chunk)), count)


def path_of(array: Path, ndim: int) -> Path:
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

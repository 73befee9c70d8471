"""One segment: a small, immutable Zarr v3 group that is visible only when whole."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from spec import files
from spec.errors import SpecError

RECORD = "record.json"
_CHUNK_ROWS = 1024
_PARTIAL = ".partial"

Arrays = Mapping[str, NDArray[Any]]


class StoreError(SpecError):
    """The store holds something other than what was asked for: says where, what was found and what to do."""


@dataclass(frozen=True)
class Record:
    """What a segment holds.

    Attributes:
        name: the segment's folder.
        items: the content key of each row, in order.
        digest: SHA-256 over every array's bytes, dtype and shape.
        bytes: size of its files.
    """

    name: str
    items: tuple[str, ...]
    digest: str
    bytes: int


def content_digest(arrays: Arrays) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of arrays, independent of codec and chunks."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def write(
    folder: Path, name: str, items: Sequence[str], arrays: Arrays, attributes: Mapping[str, Any], codec: str
) -> Record:
    """Write a segment under a temporary name, flush it to the disk, and rename it to `folder/name`.

    Whoever finds `folder/name` finds all of it. A segment that is already there is left as it is: its name follows
    from its content.

    Args:
        folder: where segments lie.
        name: the segment's name.
        items: the content key of each row.
        arrays: what to store; the first axis of each is cut into chunks.
        attributes: what a reader must know (real dtype, rule of positions, ...), kept in zarr.json.
        codec: "zstd" or "none"; every chunk carries a crc32c in both.
    """
    temporary = folder / f"{_PARTIAL}-{socket.gethostname()}-{os.getpid()}-{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        group = zarr.create_group(temporary, attributes={**attributes, "arrays": list(arrays)})
        compressors = [ZstdCodec(level=1), Crc32cCodec()] if codec == "zstd" else [Crc32cCodec()]
        for key, array in arrays.items():
            rows = -(-max(len(array), 1) // _CHUNK_ROWS) * _CHUNK_ROWS
            group.create_array(
                key,
                shape=array.shape,
                dtype=array.dtype,
                chunks=(_CHUNK_ROWS, *array.shape[1:]),
                shards=(rows, *array.shape[1:]),
                compressors=compressors,
                config={"write_empty_chunks": True},
            )[...] = array
        marks = _marks(temporary)
        size = sum(int(mark[0]) for mark in marks.values())
        record = Record(name, tuple(items), content_digest(arrays), size)
        entry = {"items": list(items), "digest": record.digest, "bytes": size, "files": marks}
        files.write_json(temporary / RECORD, entry)
        _flush(temporary)
        try:
            temporary.rename(folder / name)
        except OSError:
            if not (folder / name / RECORD).is_file():  # else another worker was first
                shutil.rmtree(folder / name, ignore_errors=True)  # the rest of a segment that lost its record
                temporary.rename(folder / name)
        return record
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_record(folder: Path, name: str) -> Record:
    """What a segment holds, without reading its arrays.

    Raises:
        StoreError: a missing or damaged record, by the segment's name.
    """
    try:
        value = files.read_json(folder / name / RECORD)
        return Record(name, tuple(value["items"]), value["digest"], value["bytes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, name, error) from error


def read(folder: Path, name: str) -> dict[str, NDArray[Any]]:
    """Every array of a segment; checked are each chunk's crc32c, every file's size, and the digests of metadata.

    Raises:
        StoreError: a missing or damaged segment, by name.
    """
    try:
        if _marks(folder / name) != files.read_json(folder / name / RECORD)["files"]:
            raise ValueError("its files are not those that were written")
        group = zarr.open_group(folder / name, mode="r")
        arrays = {}
        for key in group.attrs["arrays"]:
            arrays[key] = np.asarray(group[key][...])
        return arrays
    except Exception as error:
        raise _damaged(folder, name, error) from error


def _damaged(folder: Path, name: str, error: Exception) -> StoreError:
    return StoreError(
        f"segment {name} in {folder} is missing or damaged ({error}); delete its folder and run the stage again: "
        "only this segment is recomputed"
    )


def _marks(folder: Path) -> dict[str, list[Any]]:
    """Size of every file of a segment, and SHA-256 of its metadata, which carries no checksum of its own."""
    marks: dict[str, list[Any]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != RECORD:
            metadata = hashlib.sha256(path.read_bytes()).hexdigest() if path.name == "zarr.json" else None
            marks[path.relative_to(folder).as_posix()] = [path.stat().st_size, metadata]
    return marks


def clean_litter(folder: Path) -> None:
    """Remove what killed processes of this host left half-written."""
    pattern = re.compile(rf"{re.escape(_PARTIAL)}-{re.escape(socket.gethostname())}-(\d+)-[^-]+")
    for path in folder.glob(f"{_PARTIAL}-*"):
        match = pattern.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(folder: Path) -> None:
    """Force files and folders to the disk, so that a rename never outlives the data."""
    for path in [folder, *folder.rglob("*")]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

"""One segment: a small, immutable Zarr v3 group of whole rows that is visible only when whole.

A row is a mapping of arrays. In a segment the arrays of all rows lie one after the other, each next to its offsets;
`record.json` holds each row's digest, every file's size, and a digest of itself. docs/format.md has the layout.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from spec import files
from spec.errors import SpecError
from spec.store import shards
from spec.store.codecs import Codec

FORMAT = 3
RECORD = "record.json"
_THREADS = min(4, os.cpu_count() or 1)
_pipeline = threading.Lock()  # of zarr's configuration, which is global

Row = Mapping[str, NDArray[Any]]
Arrays = dict[str, NDArray[Any]]


class StoreError(SpecError):
    """The store holds something other than what was asked for."""


class OutdatedError(StoreError):
    """What was made by another version, or for other parameters, base or data: it has to be made again."""


class DamagedError(StoreError):
    """A segment that is missing or not as it was written."""

    def __init__(self, folder: Path, name: str, reason: object) -> None:
        super().__init__(f"segment {name} in {folder} is missing or damaged ({reason})")
        self.folder, self.name, self.reason = folder, name, str(reason)


@dataclass(frozen=True)
class Record:
    """What a segment holds."""

    name: str  # of its folder
    items: tuple[str, ...]  # the content key of each row, in order
    digests: tuple[str, ...]  # of each row, by digest_row
    files: Mapping[str, tuple[int, str | None]]  # of each its size, and for zarr.json, which has no checksum, SHA-256

    @property
    def size(self) -> int:
        """Bytes of its files, record.json apart."""
        return sum(size for size, _ in self.files.values())

    @property
    def digest(self) -> str:
        """SHA-256 of the rows' digests: equal segments are those whose rows are equal, whatever their codec."""
        return files.digest_json(list(zip(self.items, self.digests, strict=True)))

    def to_bytes(self) -> bytes:
        """The content of record.json, which ends in a digest of the rest."""
        entry: dict[str, Any] = {
            "format": FORMAT,
            "items": list(self.items),
            "digests": list(self.digests),
            "bytes": self.size,
            "files": {name: list(mark) for name, mark in self.files.items()},
        }
        entry["sha256"] = files.digest_json(entry)
        return (json.dumps(entry, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, name: str, content: bytes) -> Record:
        """Read what to_bytes wrote; a ValueError where any byte is another one, or a file is outside the folder."""
        try:
            entry = json.loads(content)
            marks = {path: (size, digest) for path, (size, digest) in entry["files"].items()}
            record = cls(name, tuple(entry["items"]), tuple(entry["digests"]), marks)
            outside = any(path.startswith("/") or ".." in path.split("/") for path in marks)
            if outside or record.to_bytes() != content:
                raise ValueError("a digest or a path is wrong")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{RECORD} is not as it was written ({error})") from error
        return record


def digest_row(row: Row) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a row's arrays, independent of codec and company."""
    digest = hashlib.sha256()
    for name in sorted(row):
        array = np.ascontiguousarray(row[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def write(
    folder: Path, name: str, items: Sequence[str], rows: Sequence[Row], attributes: Mapping[str, Any], codec: Codec
) -> Record:
    """Write the segment `folder/name`, which appears when all of it is on the disk.

    The caller holds the lock of this name (Collection.claim). The rest of a segment that lost its record is replaced.
    `items` are the keys of the rows, of which there is at least one. `attributes`, what a reader must know, are kept in
    zarr.json; their "offsets" name the offsets of each array, which arrays of equal lengths may share.
    """
    with files.whole(folder / name, folder=True) as temporary:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="segment-encoder") as pool:
            digests = pool.map(digest_row, rows)
            arrays = _joined(rows, attributes["offsets"])
            group = zarr.create_group(temporary, attributes={**attributes, "arrays": list(arrays)})
            for key, array in arrays.items():
                shards.save(group, temporary, key, array, codec, pool)
        paths = sorted(path for path in temporary.rglob("*") if path.is_file())
        marks = {path.relative_to(temporary).as_posix(): _mark(path) for path in paths}
        record = Record(name, tuple(items), tuple(digests), marks)
        (temporary / RECORD).write_bytes(record.to_bytes())
    return record


def read_record(folder: Path, name: str) -> Record:
    """What a segment holds, without reading its arrays."""
    try:
        return Record.from_bytes(name, (folder / name / RECORD).read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedError(folder, name, error) from error


def check_files(folder: Path, record: Record) -> None:
    """Check what can be checked without reading arrays: that files are there, their sizes, digests of metadata."""
    try:
        for path, mark in record.files.items():
            found = _mark(folder / record.name / path)
            if found != mark:
                what = f"is {found[0]} bytes long, not {mark[0]}" if found[0] != mark[0] else "has another content"
                raise ValueError(f"{path} {what}")
    except (OSError, ValueError) as error:
        raise DamagedError(folder, record.name, error) from error


def read(folder: Path, name: str, only: Sequence[str] | None = None) -> tuple[Arrays, dict[str, Any]]:
    """The arrays of a segment (`only` these, or all), and its attributes; each chunk's crc32c is checked, and all of
    check_files."""
    check_files(folder, read_record(folder, name))
    try:
        # Arrays that are opened so are read by Rust's zarrs, two to five times as fast as by zarr-python.
        with _pipeline, zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            group = zarr.open_group(folder / name, mode="r")
            attributes = dict(group.attrs)
            opened = {key: group[key] for key in (attributes["arrays"] if only is None else only)}
        for key, array in opened.items():
            shards.check(folder / name, key, array)
        return {key: np.asarray(array[...]) for key, array in opened.items()}, attributes
    except Exception as error:  # whatever zarr and its codecs make of damaged bytes
        raise DamagedError(folder, name, error) from error


def rows_of(arrays: Arrays, attributes: Mapping[str, Any]) -> list[Row]:
    """The rows of a segment that read returned, as views."""
    offsets: Mapping[str, str] = attributes["offsets"]
    columns = {key: np.split(arrays[key], arrays[bounds][1:-1]) for key, bounds in offsets.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def check_rows(folder: Path, record: Record, arrays: Arrays, attributes: Mapping[str, Any]) -> None:
    """Check each row of a segment that read returned against its digest; a DamagedError names the rows."""
    try:
        found = tuple(map(digest_row, rows_of(arrays, attributes)))
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedError(folder, record.name, error) from error
    if found != record.digests:
        wrong = [row for row, pair in enumerate(zip(found, record.digests, strict=False)) if pair[0] != pair[1]]
        raise DamagedError(folder, record.name, f"rows {wrong} have another content")


def _joined(rows: Sequence[Row], offsets: Mapping[str, str]) -> Arrays:
    """The arrays of a segment: every row's one after the other, and where each begins."""
    bounds: Arrays = {}
    for key, name in offsets.items():
        ends = np.cumsum([0, *(len(row[key]) for row in rows)], dtype=np.int64)
        if not np.array_equal(bounds.setdefault(name, ends), ends):
            raise ValueError(f"{key} does not share the lengths of the other arrays of {name}")
    return {key: np.concatenate([row[key] for row in rows]) for key in offsets} | bounds


def _mark(path: Path) -> tuple[int, str | None]:
    """Size of a file, and SHA-256 of metadata, which carries no checksum of its own."""
    if path.name != "zarr.json":
        return path.stat().st_size, None
    return path.stat().st_size, files.digest_file(path)


def names(folder: Path) -> Iterator[str]:
    """Names of the folders that stand for segments, whole or not, in order."""
    with contextlib.suppress(FileNotFoundError):
        yield from sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))

"""All segments of one identity: what is there, what is missing, in which groups the missing is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spec import files
from spec.store import segment
from spec.store.segment import Arrays, Record, StoreError

FORMAT = 1


def item_key(*arrays: NDArray[Any]) -> str:
    """Content key of one row: 128 bits of SHA-256 over its arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{len(array)}:".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Collection:
    """Segments that share one identity; nothing computed under another identity is ever found here.

    Attributes:
        root: the store.
        kind: what is kept: "features" or "answers".
        identity: everything the content depends on beside the row itself.
    """

    root: Path
    kind: str
    identity: Mapping[str, Any]
    _records: dict[str, Record] = field(default_factory=dict, repr=False, compare=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the identity."""
        return files.digest_json({"format": FORMAT, **self.identity})

    @property
    def folder(self) -> Path:
        """Where this identity's segments lie."""
        return self.root / f"{self.kind}-{self.digest[:16]}"

    def create(self) -> None:
        """Make the folder, write down the identity, and clean up after killed processes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "identity.json"
        if not path.is_file():
            files.write_json(path, {"format": FORMAT, **self.identity})
        segment.clean_litter(self.folder)

    def records(self) -> dict[str, Record]:
        """The committed segments by name; a segment's record is read once."""
        for path in sorted(self.folder.glob(f"[!.]*/{segment.RECORD}")):
            name = path.parent.name
            if name not in self._records:
                record = segment.read_record(self.folder, name)
                if self.name_of(record.items) != name:
                    raise StoreError(
                        f"segment {name} in {self.folder} is damaged: its record lists other rows than its name stands "
                        "for; delete its folder and run the stage again: only this segment is recomputed"
                    )
                self._records[name] = record
        return self._records

    def find(self) -> dict[str, tuple[str, int]]:
        """Where each stored row lies: key -> (segment, row)."""
        return {key: (name, row) for name, record in self.records().items() for row, key in enumerate(record.items)}

    def name_of(self, items: Sequence[str]) -> str:
        """The name of the segment that holds exactly these rows."""
        return hashlib.sha256("\n".join([self.digest, *items]).encode()).hexdigest()[:32]

    def write(self, items: Sequence[str], arrays: Arrays, attributes: Mapping[str, Any], codec: str) -> Record:
        """Commit a segment."""
        attributes = {"identity": self.digest, "kind": self.kind, **attributes}
        return segment.write(self.folder, self.name_of(items), items, arrays, attributes, codec)

    def read(self, name: str) -> dict[str, NDArray[Any]]:
        """Every array of a segment, checked."""
        return segment.read(self.folder, name)


def plan(
    keys: Sequence[str],
    lengths: Sequence[int],
    known: Iterable[str],
    bucket: Callable[[int], int],
    limit: int,
    cost: Callable[[int], int] = lambda length: length,
) -> list[list[int]]:
    """Group the rows that are not stored yet into segments.

    A group takes rows of one bucket in the order of the data and closes by its own content alone. So taking
    finished groups away leaves the others as they are: a resumed run and several workers make the same segments as
    one uninterrupted worker, and appended rows make new ones.

    Args:
        keys: content key of each row; repeated rows count once.
        lengths: tokens of each row.
        known: keys already stored.
        bucket: padded length of a row of this length.
        limit: a group closes once its rows' costs reach this.
        cost: of a row of this length; its tokens, unless told otherwise.

    Returns:
        Row numbers by group, the longest bucket first, so that running out of memory happens at once.
    """
    seen = set(known)
    groups: dict[int, list[list[int]]] = {}
    filled: dict[int, int] = {}
    for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
        if key in seen:
            continue
        seen.add(key)
        padded = bucket(length)
        if filled.get(padded, limit) >= limit:
            groups.setdefault(padded, []).append([])
            filled[padded] = 0
        groups[padded][-1].append(row)
        filled[padded] += cost(length)
    return [group for padded in sorted(groups, reverse=True) for group in groups[padded]]


class Writer:
    """Commits segments on a thread of its own, so that the base never waits for compression or the disk.

    At most one segment waits while one is written. Leaving the block waits for both and raises what went wrong.
    """

    def __init__(self, collection: Collection, codec: str) -> None:
        self._collection, self._codec = collection, codec
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="segment-writer")
        self._pending: list[Any] = []

    def write(self, items: Sequence[str], arrays: Arrays, attributes: Mapping[str, Any]) -> None:
        """Commit a segment soon; waits only when two are already on their way."""
        while len(self._pending) > 1:
            self._pending.pop(0).result()
        self._pending.append(self._pool.submit(self._collection.write, items, arrays, attributes, self._codec))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for future in self._pending:
                future.result()
        finally:
            self._pool.shutdown()


__all__ = ["FORMAT", "Arrays", "Collection", "Record", "StoreError", "Writer", "item_key", "plan"]

"""An index from the rows of a user's data to what was stored of them.

A row's ids change with the chat template, its date and the tokenizer; the row itself does not. So the stages that
store something write down, by the digest of each source row, what the ids of that row began with. Each file in
STORE/sources is written once and named by its content; only `drop` rewrites them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spec import files
from spec.corpus import TokenSequence
from spec.store.segment import StoreError

FOLDER = "sources"

_ENTRY = np.dtype([("source", "V16"), ("digest", "V16"), ("length", "<i4"), ("whole", "?")])


@dataclass(frozen=True)
class Start:
    """What the ids of a stored row begin with (the prompt) or, for plain text, all of them."""

    length: int
    digest: bytes
    whole: bool  # whether a row must have no other ids

    @classmethod
    def of(cls, row: TokenSequence) -> Start:
        """Of a row as it is tokenized."""
        ids = row.ids[: row.prompt_length] if row.prompt_length else row.ids
        return cls(len(ids), digest_ids(ids), whole=not row.prompt_length)


def digest_ids(ids: npt.NDArray[np.integer]) -> bytes:
    """16 bytes that stand for some ids."""
    return hashlib.sha256(np.ascontiguousarray(ids, np.int32).tobytes()).digest()[:16]


def write(root: Path, rows: Iterable[TokenSequence]) -> None:
    """Add rows to the index of a store, before anything is stored of them."""
    starts = {(row.source, Start.of(row)) for row in rows if row.source}
    entries = sorted((source, start.digest, start.length, start.whole) for source, start in starts)
    if entries:
        _save(root, np.array(entries, _ENTRY))


def find(root: Path, sources: Container[bytes]) -> dict[bytes, set[Start]]:
    """What was ever written down of some source rows."""
    found: dict[bytes, set[Start]] = {}
    for _, entries in _read(root):
        for source, digest, length, whole in entries.tolist():
            if source in sources:
                found.setdefault(source, set()).add(Start(length, digest, whole))
    return found


def drop(root: Path, sources: Container[bytes]) -> None:
    """Take source rows out of the index."""
    for path, entries in _read(root):
        left = np.array([source not in sources for source in entries["source"].tolist()], bool)
        if not left.all():
            if left.any():
                _save(root, entries[left])
            files.remove(path)


def _save(root: Path, entries: npt.NDArray[np.void]) -> None:
    path = root / FOLDER / f"{hashlib.sha256(entries.tobytes()).hexdigest()[:32]}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, entries, allow_pickle=False)


def _read(root: Path) -> Iterator[tuple[Path, npt.NDArray[np.void]]]:
    for path in sorted((root / FOLDER).glob("*.npy")):
        try:
            entries = np.load(path, allow_pickle=False)
            if entries.dtype != _ENTRY:
                raise ValueError(f"found {entries.dtype}, expected {_ENTRY}")
        except (OSError, EOFError, ValueError) as error:
            raise StoreError(
                f"{path} is damaged ({error}), so rows can no longer be found by it: remove it; what is missing is "
                "written anew by the next run"
            ) from None
        yield path, entries

"""Token sequences, and the parquet file that carries them from stage to stage."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from spec import files
from spec.errors import SpecError

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.uint8]

_TYPES = {
    "ids": pa.list_(pa.int32()),
    "mask": pa.list_(pa.uint8()),
    "domain": pa.string(),
    "prompt_length": pa.int32(),
    "source": pa.binary(),
}
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _TYPES.items()])
ROWS_PER_GROUP = 1024
_ORIGIN = b"origin"


class CorpusError(SpecError):
    """Text that cannot be used: says where it is, what was found and what would fit."""


@dataclass(frozen=True, eq=False, slots=True)
class TokenSequence:
    """One row, tokenized."""

    ids: Ids  # [T]
    mask: Mask  # [T], 1 where the token is supervised: it was written by the assistant, or is plain text
    domain: str  # what the row is counted under in reports
    prompt_length: int  # tokens before the last answer; T when that is still to be written; 0 for plain text
    source: bytes = b""  # 16 bytes for the row's prompt or text as the data had it; empty where it is not known

    def __post_init__(self) -> None:
        if self.mask.shape != self.ids.shape or not 0 <= self.prompt_length <= len(self.ids):
            raise ValueError(
                f"ids {self.ids.shape}, mask {self.mask.shape} and prompt_length {self.prompt_length} do not fit "
                "together: one mask entry a token, and a prompt no longer than the sequence"
            )

    def __len__(self) -> int:
        return len(self.ids)


def answer(sequence: TokenSequence) -> Ids:
    """The tokens of the last answer, its end-of-turn token included: int32 [T - prompt_length], a view."""
    return sequence.ids[sequence.prompt_length :]


def spans(mask: Sequence[int] | Mask) -> list[tuple[int, int]]:
    """The maximal runs of ones in a mask, as (start, stop) with stop excluded."""
    edges = np.flatnonzero(np.diff(np.asarray(mask, dtype=np.int8), prepend=0, append=0))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def write(path: str | Path, sequences: Iterable[TokenSequence], origin: Mapping[str, Any] | None = None) -> int:
    """Write sequences to a parquet file, and return how many; where a generator of them raises, what was there stays.

    `origin`, plain values, is what the sequences were made with; read_origin gives it back.
    """
    count = 0
    schema = SCHEMA.with_metadata({_ORIGIN: json.dumps(dict(origin or {}))})
    with files.whole(Path(path)) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        rows = iter(sequences)
        while group := list(islice(rows, ROWS_PER_GROUP)):
            writer.write_batch(_record_batch(group))
            count += len(group)
    return count


def read_origin(path: str | Path) -> dict[str, Any]:
    """What the sequences of a file were made with, as write was told; empty where it was told nothing."""
    with _clear(path):
        origin: dict[str, Any] = json.loads((pq.read_schema(path).metadata or {}).get(_ORIGIN, b"{}"))
    return origin


def _record_batch(group: Sequence[TokenSequence]) -> pa.RecordBatch:
    offsets = np.cumsum([0, *map(len, group)]).astype(np.int32)
    lists = (
        np.concatenate([s.ids for s in group], dtype=np.int32),
        np.concatenate([s.mask for s in group], dtype=np.uint8),
    )
    plain = ("domain", "prompt_length", "source")
    arrays = [pa.ListArray.from_arrays(offsets, values) for values in lists]
    arrays += [pa.array([getattr(s, name) for s in group], _TYPES[name]) for name in plain]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def read(path: str | Path) -> list[TokenSequence]:
    """Read what `write` wrote."""
    with _clear(path):
        table = pq.read_table(Path(path), partitioning=None)
    other = f"{path}: not a file of token sequences"
    if (table.schema.names, table.schema.types) != (SCHEMA.names, SCHEMA.types):
        raise CorpusError(f"{other}: found columns {columns(table.schema)}, expected {columns(SCHEMA)}")
    sequences: list[TokenSequence] = []
    for batch in table.to_batches():
        if any(column.null_count for column in batch.columns):
            raise CorpusError(f"{other}: it has nulls")
        ids, mask, *plain = batch.columns
        # One copy a batch, so that what is handed out can be written to and torch.from_numpy accepts it.
        all_ids, all_mask = np.array(ids.flatten()), np.array(mask.flatten())
        starts = np.concatenate([[0], np.cumsum(ids.value_lengths())]).tolist()
        if not ids.value_lengths().equals(mask.value_lengths()):
            raise CorpusError(f"{other}: ids and mask differ in length")
        rows = zip(starts[:-1], starts[1:], *(column.to_pylist() for column in plain), strict=True)
        try:
            sequences += [TokenSequence(all_ids[a:b], all_mask[a:b], *rest) for a, b, *rest in rows]
        except ValueError as error:
            raise CorpusError(f"{other}: {error}") from error
    return sequences


@contextlib.contextmanager
def _clear(path: str | Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CorpusError(f"{path}: no such file; the stage that writes it has not run") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorpusError(f"{path}: not a readable parquet file ({error})") from error


def columns(schema: pa.Schema) -> str:
    """The names and types of a file's columns, for messages."""
    return ", ".join(f"{field.name} ({field.type})" for field in schema) or "no columns"

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

SCHEMA = pa.schema(
    [
        pa.field("ids", pa.list_(pa.int32()), nullable=False),
        pa.field("mask", pa.list_(pa.uint8()), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("prompt_length", pa.int32(), nullable=False),
        pa.field("source", pa.binary(), nullable=False),
    ]
)
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
    """Write sequences to a parquet file, and return how many; nothing is at `path` until all of it is.

    A generator is consumed in pieces of ROWS_PER_GROUP sequences; where it raises, what was at `path` stays. `origin`,
    plain values, is what the sequences were made with; read_origin gives it back.
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
    """What the sequences of a file were made with, as write was told; empty where it was told nothing.

    Raises:
        CorpusError: no such file, or not one of write's.
    """
    with _clear(path):
        origin: dict[str, Any] = json.loads((pq.read_schema(path).metadata or {}).get(_ORIGIN, b"{}"))
    return origin


def _record_batch(group: Sequence[TokenSequence]) -> pa.RecordBatch:
    offsets = np.zeros(len(group) + 1, dtype=np.int32)
    np.cumsum([len(s) for s in group], out=offsets[1:])
    return pa.RecordBatch.from_arrays(
        [
            pa.ListArray.from_arrays(offsets, np.concatenate([s.ids for s in group]).astype(np.int32, copy=False)),
            pa.ListArray.from_arrays(offsets, np.concatenate([s.mask for s in group]).astype(np.uint8, copy=False)),
            pa.array([s.domain for s in group], pa.string()),
            pa.array([s.prompt_length for s in group], pa.int32()),
            pa.array([s.source for s in group], pa.binary()),
        ],
        schema=SCHEMA,
    )


def read(path: str | Path) -> list[TokenSequence]:
    """Read what `write` wrote.

    Raises:
        CorpusError: no such file, not a parquet file, other columns or types, or entries that contradict each other.
    """
    with _clear(path):
        table = pq.read_table(Path(path), partitioning=None)
    if (table.schema.names, table.schema.types) != (SCHEMA.names, SCHEMA.types):
        found, expected = columns(table.schema), columns(SCHEMA)
        raise CorpusError(f"{path}: not a file of token sequences: found columns {found}, expected {expected}")
    sequences: list[TokenSequence] = []
    for batch in table.to_batches():
        if any(column.null_count for column in batch.columns):
            raise CorpusError(f"{path}: not a file of token sequences: it has nulls")
        ids, mask, *plain = batch.columns
        # One copy a batch, so that what is handed out can be written to and torch.from_numpy accepts it.
        all_ids, all_mask = np.array(ids.flatten()), np.array(mask.flatten())
        starts = np.concatenate([[0], np.cumsum(ids.value_lengths())]).tolist()
        if not ids.value_lengths().equals(mask.value_lengths()):
            raise CorpusError(f"{path}: not a file of token sequences: ids and mask differ in length")
        rows = zip(starts[:-1], starts[1:], *(column.to_pylist() for column in plain), strict=True)
        try:
            sequences += [TokenSequence(all_ids[a:b], all_mask[a:b], *rest) for a, b, *rest in rows]
        except ValueError as error:
            raise CorpusError(f"{path}: not a file of token sequences: {error}") from error
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

"""What a segment of hidden states holds, and how the frozen base fills it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from spec import base as base_model
from spec import files
from spec.base import Base
from spec.store.collection import Collection, Writer
from spec.store.segment import StoreError

BATCH_TOKENS = 8192
"""Padded tokens of one forward pass."""

TABLES = "tables.safetensors"
POSITION_RULE = "state at t where mask[t+1]"


def kept_positions(mask: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Positions t whose state is stored: those where x_{t+1} is supervised."""
    return np.flatnonzero(mask[1:])


def identity(base: Mapping[str, str], dtype: str) -> dict[str, Any]:
    """Everything a state depends on beside the sequence.

    Args:
        base: identify's digests; the tokenizer's too, since ids of another one mean another text.
        dtype: of the base's arithmetic and of the stored states.
    """
    return {
        "base": base["weights"],
        "tokenizer": base["tokenizer"],
        "dtype": dtype,
        "layer": "last",
        "norm": "after the final norm",
        "positions": POSITION_RULE,
        "producer": f"transformers, padded to {base_model.BUCKET}",
    }


def stored_bytes(positions: int, tokens: int, hidden_size: int, dtype: str) -> int:
    """Upper bound of what states, ids and mask take on the disk, in bytes."""
    return positions * hidden_size * (4 if dtype == "float32" else 2) + 5 * tokens


@torch.inference_mode()
def produce(
    base: Base,
    collection: Collection,
    rows: Sequence[tuple[str, NDArray[np.int32], NDArray[np.uint8]]],
    groups: Sequence[Sequence[int]],
    codec: str,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> None:
    """Run the base once over groups of rows and commit one segment a group.

    Args:
        base: the frozen model.
        collection: where the segments go.
        rows: key, ids [T] and mask [T] of each row.
        groups: row numbers, as collection.plan gives them (each group of one padded length).
        codec: of the segments.
        on_tokens: called with the number of tokens just done.

    Raises:
        StoreError: a state is NaN or infinite; names the row.
    """
    with Writer(collection, codec) as writer:
        for group in groups:
            states: list[NDArray[Any]] = []
            width = base_model.bucket(max(len(rows[row][1]) for row in group))
            size = max(1, BATCH_TOKENS // width)
            for start in range(0, len(group), size):
                states += _forward(base, [rows[row] for row in group[start : start + size]], width)
                on_tokens(sum(len(rows[row][1]) for row in group[start : start + size]))
            arrays = {
                "states": np.concatenate(states),
                "ids": np.concatenate([rows[row][1] for row in group]),
                "mask": np.concatenate([rows[row][2] for row in group]),
                "state_offsets": _offsets(map(len, states)),
                "token_offsets": _offsets(len(rows[row][1]) for row in group),
            }
            attributes = {"dtype": str(base.model.dtype).removeprefix("torch."), "positions": POSITION_RULE}
            writer.write([rows[row][0] for row in group], arrays, attributes)


def _forward(
    base: Base, rows: Sequence[tuple[str, NDArray[np.int32], NDArray[np.uint8]]], width: int
) -> list[NDArray[Any]]:
    """The kept states of a few rows, each [P, d]; 16-bit floats as their bits."""
    ids = np.zeros((len(rows), width), np.int64)
    for row, (_, tokens, _) in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    hidden = base_model.hidden_states(base.model, torch.from_numpy(ids).to(base.device))
    kept = [hidden[row, torch.from_numpy(kept_positions(mask)).to(base.device)] for row, (*_, mask) in enumerate(rows)]
    sizes = [len(states) for states in kept]
    flat = torch.cat(kept)
    if not flat.isfinite().all():
        bad = next(row for row, states in enumerate(kept) if not states.isfinite().all())
        raise StoreError(
            f"a hidden state of the sequence that begins with the ids {rows[bad][1][:8].tolist()} is NaN or infinite; "
            "nothing of its segment was stored. Try model.dtype=float32, or check the base's weights"
        )
    if flat.dtype.itemsize == 2:
        flat = flat.view(torch.uint16)
    return np.split(flat.cpu().numpy(), np.cumsum(sizes)[:-1])


def _offsets(lengths: Any) -> NDArray[np.int64]:
    return np.cumsum([0, *lengths], dtype=np.int64)


def save_tables(base: Base, collection: Collection) -> None:
    """Keep the base's embedding and lm_head [V, d] beside its states, so that training never loads the base."""
    path = collection.folder / TABLES
    if path.is_file():
        return
    tables = {"embedding": base.embedding[: base.vocab_size], "lm_head": base.lm_head}
    with files.replacing(path) as temporary:
        save_file({name: table.detach().cpu().clone() for name, table in tables.items()}, temporary)


def load_tables(collection: Collection) -> dict[str, torch.Tensor]:
    """The base's "embedding" and "lm_head", each [V, d]."""
    return load_file(collection.folder / TABLES)

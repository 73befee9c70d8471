"""What a segment of hidden states holds, and how the frozen base fills it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spec import base as base_model
from spec.base import Base, Logits
from spec.config import Features
from spec.corpus import TokenSequence
from spec.device import fetch, send
from spec.heads import LAST, Tap
from spec.store import codecs
from spec.store.codecs import CODECS, Codec
from spec.store.collection import Collection, Writer, share_out
from spec.store.manifest import Manifest, make_manifest
from spec.store.plan import Parts, item_key, plan_groups
from spec.store.segment import Row, StoreError

BATCH_TOKENS = 8192
"""Padded tokens of one forward pass; halved for as long as memory runs out."""

POSITION_RULE = "state at t where mask[t+1]"
TABLES = ("tables",)
"""In place of row keys: the segment of the base's embedding and lm_head."""


@dataclass(frozen=True)
class FeatureRow:
    """A sequence whose states are to be stored: key, ids [T] and mask [T]."""

    key: str
    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]

    @classmethod
    def of(cls, row: TokenSequence) -> FeatureRow:
        """A sequence under the key of its content."""
        return cls(item_key(row.ids, row.mask), row.ids, row.mask)


def offsets(codec: Codec) -> dict[str, str]:
    """The arrays of a segment, and which offsets cut each of them into rows."""
    vectors = ("states", "scales") if codec.rounds else ("states",)
    return {**dict.fromkeys(vectors, "state_offsets"), **dict.fromkeys(("ids", "mask"), "token_offsets")}


def kept_positions(mask: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Positions t whose state is stored: those where x_{t+1} is supervised."""
    return np.flatnonzero(mask[1:])


def codec_of(params: Features, tap: Tap = LAST) -> Codec:
    """How the vectors of a tap are stored."""
    return CODECS[params.codec if tap.layer is None else params.layer_codec]


def identity(base: Mapping[str, str], dtype: str, codec: Codec) -> dict[str, Any]:
    """Everything a state depends on besides the sequence.

    The base's tokenizer is part of it, since ids of another one mean another text; lossless codecs make no difference.
    """
    return {
        "base": base["weights"],
        "tokenizer": base["tokenizer"],
        "dtype": dtype,
        "layer": "last",
        "norm": "after the final norm",
        "positions": POSITION_RULE,
        "encoding": codec.encoding,
        "producer": f"transformers, padded to {base_model.BUCKET}",
    }


def plan(rows: Sequence[FeatureRow], known: Iterable[str], segment_tokens: int) -> list[list[int]]:
    """Groups of the rows whose states are not stored yet, each of one padded length and about segment_tokens tokens."""
    lengths = [len(row.ids) for row in rows]
    return plan_groups([row.key for row in rows], lengths, known, base_model.bucket, segment_tokens)


def describe(
    collection: Collection, rows: Sequence[TokenSequence], keys: Sequence[str], base: Mapping[str, Any], greedy: bool
) -> Manifest:
    """The manifest of sequences that are all in the store.

    Args:
        collection: of their states.
        rows: the sequences.
        keys: of each of them.
        base: name, revision and digests, as data/sources.json has them.
        greedy: whether the base wrote their last answers greedily.
    """
    return make_manifest(
        collection,
        keys,
        base=base,
        **tables_shape(collection),
        prompt_length=[row.prompt_length for row in rows],
        written=[greedy and row.prompt_length > 0 for row in rows],
        domains=[row.domain for row in rows],
        tokens=sum(map(len, rows)),
        positions=sum(int(row.mask[1:].sum()) for row in rows),
    )


def stored_bytes(positions: int, tokens: int, hidden_size: int, dtype: str, codec: Codec) -> int:
    """Upper bound of what states, ids and mask take on the disk, in bytes."""
    return positions * codec.position_bytes(hidden_size, dtype) + 5 * tokens


@torch.inference_mode()
def produce(
    base: Base,
    collection: Collection,
    rows: Sequence[FeatureRow],
    groups: Sequence[Sequence[int]],
    codec: Codec,
    on_tokens: Callable[[int], object] = lambda count: None,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Run the base once over groups of rows and commit one segment a group.

    Args:
        base: the frozen model.
        collection: where the segments go.
        rows: everything that groups refer to.
        groups: row numbers, as plan gives them (each group of one padded length).
        codec: of the segments.
        on_tokens: called with the number of tokens just done.
        rank: this worker among the `world` that share the groups.

    Raises:
        StoreError: a state is NaN or infinite, or memory does not suffice for one row; names the row.
    """
    attributes = {
        "dtype": str(base.dtype).removeprefix("torch."),
        "positions": POSITION_RULE,
        "offsets": offsets(codec),
        "producer": base.producer,
    }
    parts = Parts(BATCH_TOKENS, "data.max_length")
    with Writer(codec) as writer:
        for index, claim in share_out(collection, [[rows[r].key for r in group] for group in groups], rank, world):
            group = [rows[r] for r in groups[index]]
            lengths = [len(row.ids) for row in group]
            most = base.limits.most
            if most is not None and max(lengths) > most:
                raise StoreError(
                    f"a sequence has {max(lengths)} tokens and the base {most} positions; lower data.max_length"
                )
            width = base_model.bucket(max(lengths))
            batches = []
            for part, batch in parts.run(partial(_forward, base, group, width, codec), lengths, width):
                batches.append(batch)
                on_tokens(sum(lengths[part]))
            writer.write(claim, (row for batch in batches for row in batch.rows()), attributes)


@dataclass(frozen=True)
class _Batch:
    """Encoded states of a few rows, on their way off the device."""

    group: Sequence[FeatureRow]
    encoded: dict[str, Callable[[], Tensor]]
    finite: Callable[[], Tensor]

    def rows(self) -> Iterator[Row]:
        """The rows as they are stored; waits for the device."""
        finite = self.finite()
        if not finite.all():
            bad = self.group[int((~finite).nonzero()[0])]
            raise StoreError(
                f"a hidden state of the sequence {bad.key} (it begins with the ids {bad.ids[:8].tolist()}) is NaN or "
                "infinite; nothing of its segment was stored. Try model.dtype=float32, or check the base's weights"
            )
        ends = np.cumsum([len(kept_positions(row.mask)) for row in self.group])[:-1]
        parts = {key: np.split(codecs.to_numpy(wait()), ends) for key, wait in self.encoded.items()}
        for index, row in enumerate(self.group):
            yield {**{key: part[index] for key, part in parts.items()}, "ids": row.ids, "mask": row.mask}


def _forward(base: Base, rows: Sequence[FeatureRow], width: int, codec: Codec, part: slice) -> _Batch:
    """Run the base over a part of rows of one bucket; on CUDA nothing here waits for the device."""
    group = rows[part]
    ids = np.zeros((len(group), width), np.int64)
    kept = np.zeros((len(group), width), np.bool_)
    for number, row in enumerate(group):
        ids[number, : len(row.ids)] = row.ids
        kept[number, : len(row.ids) - 1] = row.mask[1:]
    at = send(torch.from_numpy(np.flatnonzero(kept)), base.device)
    hidden = base_model.hidden_states(base.model, send(torch.from_numpy(ids), base.device))
    flat = hidden.flatten(0, 1).index_select(0, at).to(base.dtype)  # [P, d]
    # amax hands NaN on, and is five times as fast as isfinite on a CPU.
    damaged = (~flat.abs().amax(1).isfinite()).float() if flat.numel() else flat.new_zeros(0, dtype=torch.float32)
    count = torch.zeros(len(group), device=base.device).index_add_(0, at // width, damaged)
    encoded = {key: fetch(tensor) for key, tensor in codec.encode(flat).items()}
    return _Batch(group, encoded, fetch(count == 0))


def save_tables(base: Base, collection: Collection, rows: Sequence[FeatureRow]) -> None:
    """Keep the base's embedding and lm_head [V, d] with its states, and lm_head's bias [V] where it has one, so that
    training never loads the base.

    How lm_head makes the base's logits is found out on the first of `rows`.
    """
    claim = collection.claim(TABLES)
    if claim is None:
        return
    tables = base.tables
    kind = base_model.find_logits(base, [row.ids for row in rows])
    bias = base_model.bias_of(base.model)
    if bias is not None:
        tables["bias"] = bias
    row = {name: codecs.to_numpy(table.detach().cpu().to(base.dtype).contiguous()) for name, table in tables.items()}
    attributes = {
        "dtype": str(base.dtype).removeprefix("torch."),
        "offsets": {name: f"{name}_offsets" for name in row},
        "vocab_size": base.vocab_size,
        "hidden_size": base.hidden_size,
        "linear_logits": kind == base_model.PLAIN,
        "logits": None if kind is None else asdict(kind),
        "producer": base.producer,
    }
    claim.commit([row], attributes, codecs.ZSTD)


def has_tables(collection: Collection) -> bool:
    """Whether save_tables has run."""
    return collection.holds(TABLES)


def tables_shape(collection: Collection) -> dict[str, int]:
    """The base's hidden_size and vocab_size; reads no table."""
    _, attributes = collection.read(collection.name_of(TABLES), only=())
    return {name: attributes[name] for name in ("hidden_size", "vocab_size")}


def logits(collection: Collection) -> Logits | None:
    """How the base's logits follow from its tables and states, so that soft targets follow from the cache alone."""
    _, attributes = collection.read(collection.name_of(TABLES), only=())
    if "logits" not in attributes:  # tables from before scales, caps and biases were known
        return base_model.PLAIN if attributes["linear_logits"] else None
    return None if attributes["logits"] is None else Logits(**attributes["logits"])


def positions_of(collection: Collection, name: str) -> int:
    """Stored positions of a segment; reads no states."""
    arrays, _ = collection.read(name, only=("state_offsets",))
    return int(arrays["state_offsets"][-1])


def load_tables(collection: Collection) -> dict[str, Tensor]:
    """The base's "embedding" and "lm_head", each [V, d], and where lm_head has one its "bias" [V]; a DamagedError says
    that they are missing or damaged."""
    arrays, attributes = collection.read(collection.name_of(TABLES))
    dtype = getattr(torch, attributes["dtype"])
    return {name: codecs.from_numpy(arrays[name], dtype) for name in attributes["offsets"]}

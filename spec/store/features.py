"""What a segment of states holds, and how the frozen base fills it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spec import base as base_model
from spec.base import Base
from spec.config import Config
from spec.corpus import TokenSequence
from spec.device import fetch, send
from spec.heads import LAST, Tap
from spec.store import codecs, identity
from spec.store.codecs import CODECS, Codec
from spec.store.collection import Claim, Collection, Writer, share_out
from spec.store.plan import Parts, item_key, plan_groups
from spec.store.segment import Row, StoreError

BATCH_TOKENS = 8192  # padded tokens of one forward pass; halved for as long as memory runs out


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


@dataclass(frozen=True)
class TapStore:
    """Where the vectors of one tap are kept, and how."""

    tap: Tap
    codec: Codec
    collection: Collection

    def position_bytes(self, rows: Sequence[FeatureRow], width: int, dtype: str) -> int:
        """What the vectors of some rows take before lossless compression, in bytes."""
        each = self.codec.position_bytes(width, dtype)
        return each * sum(len(kept_positions(row.mask, self.tap)) for row in rows)


Group = tuple[Sequence[int], Sequence[int]]  # numbers of rows that are computed together, and of the taps they lack


def tap_stores(
    root: Path, base: Mapping[str, str], config: Config, arithmetic: str, layers: int | None
) -> list[TapStore]:
    """Where the vectors of each tap that the method reads are kept, LAST first; a StoreError where the base has too few
    layers for the method."""
    try:
        taps = config.model.speculator.taps(layers)
    except ValueError as error:
        raise StoreError(f"model.speculator.{error}") from None
    stores = []
    for tap in dict.fromkeys((LAST, *taps)):
        codec = CODECS[config.features.codec if tap.layer is None else config.features.layer_codec]
        content = identity.states(base, config.model.dtype, tap, codec, arithmetic)
        stores.append(TapStore(tap, codec, Collection(root, "states", content)))
    return stores


def kept_positions(mask: NDArray[np.uint8], tap: Tap = LAST) -> NDArray[np.int64]:
    """Positions t of a sequence at which a tap's vectors are stored; "answers": where x_{t+1} is supervised."""
    return np.flatnonzero(mask[1:]) if tap.positions == "answers" else np.arange(len(mask))


def offsets(codec: Codec) -> dict[str, str]:
    """The arrays of a segment, and which offsets cut each of them into rows."""
    vectors = ("states", "scales") if codec.rounds else ("states",)
    return {**dict.fromkeys(vectors, "state_offsets"), **dict.fromkeys(("ids", "mask"), "token_offsets")}


def plan(rows: Sequence[FeatureRow], known: Sequence[Container[str]], segment_tokens: int) -> list[Group]:
    """Groups of the rows of which the store lacks something, each of one padded length and about segment_tokens tokens.

    `known` has for each tap the keys of the rows that the store has. The longest rows come first, so that running out
    of memory happens at once.
    """
    lacking: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        taps = tuple(tap for tap, keys in enumerate(known) if row.key not in keys)
        if taps:
            lacking.setdefault(taps, []).append(number)
    groups: list[Group] = []
    for taps, numbers in lacking.items():
        keys, lengths = [rows[number].key for number in numbers], [len(rows[number].ids) for number in numbers]
        for group in plan_groups(keys, lengths, (), base_model.bucket, segment_tokens):
            groups.append(([numbers[index] for index in group], taps))
    return sorted(groups, key=lambda group: base_model.bucket(len(rows[group[0][0]].ids)), reverse=True)


@torch.inference_mode()
def produce(
    base: Base,
    stores: Sequence[TapStore],
    rows: Sequence[FeatureRow],
    groups: Sequence[Group],
    on_tokens: Callable[[int], object] = lambda count: None,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Run the base once over groups of rows (as plan gives them), and commit a segment of each tap that a group lacks.

    `on_tokens` is called with the number of tokens just done; `rank` is this worker among the `world` that share the
    groups. A StoreError names a row with a state that is NaN or infinite, or for which memory does not suffice.
    """
    parts = Parts(BATCH_TOKENS, "data.max_length")
    wanted = [
        [(stores[tap].collection, [rows[row].key for row in numbers]) for tap in taps] for numbers, taps in groups
    ]
    by_folder = {store.collection.folder: store for store in stores}
    with Writer() as writer:
        for index, claims in share_out(wanted, rank, world):
            group = [rows[number] for number in groups[index][0]]
            lengths = [len(row.ids) for row in group]
            claimed = [by_folder[claim.collection.folder] for claim in claims]
            width, batches = base_model.bucket(max(lengths)), []
            for part, batch in parts.run(partial(_forward, base, claimed, group, width), lengths, width):
                batches.append(batch)
                on_tokens(sum(lengths[part]))
            writer.write(claims, partial(_commit, base, list(zip(claims, claimed, strict=True)), batches))


@dataclass(frozen=True)
class _Batch:
    """Encoded vectors of a few rows, by tap, on their way off the device."""

    group: Sequence[FeatureRow]
    encoded: Mapping[Tap, Mapping[str, Callable[[], Tensor]]]
    finite: Callable[[], Tensor]  # [rows]

    def rows(self, tap: Tap) -> Iterator[Row]:
        """The rows of a tap as they are stored."""
        ends = np.cumsum([len(kept_positions(row.mask, tap)) for row in self.group])[:-1]
        parts = {key: np.split(codecs.to_numpy(wait()), ends) for key, wait in self.encoded[tap].items()}
        for index, row in enumerate(self.group):
            yield {**{key: part[index] for key, part in parts.items()}, "ids": row.ids, "mask": row.mask}


def _commit(base: Base, claimed: Sequence[tuple[Claim, TapStore]], batches: Sequence[_Batch]) -> None:
    for batch in batches:
        finite = batch.finite()
        if not finite.all():
            bad = batch.group[int((~finite).nonzero()[0])]
            raise StoreError(
                f"a hidden state of the sequence {bad.key} (it begins with the ids {bad.ids[:8].tolist()}) is NaN or "
                "infinite; nothing of its segment was stored. Try model.dtype=float32, or check the base's weights"
            )
    for claim, store in claimed:
        rows = [row for batch in batches for row in batch.rows(store.tap)]
        attributes = {
            "dtype": str(base.dtype).removeprefix("torch."),
            "width": rows[0]["states"].shape[1],
            "offsets": offsets(store.codec),
            "producer": base.producer,
        }
        claim.commit(rows, attributes, store.codec)


def _forward(base: Base, stores: Sequence[TapStore], rows: Sequence[FeatureRow], width: int, part: slice) -> _Batch:
    """Run the base over a part of rows of one bucket; on CUDA nothing here waits for the device."""
    group = rows[part]
    ids = np.stack([np.pad(row.ids, (0, width - len(row.ids))) for row in group]).astype(np.int64)
    found = base_model.read_taps(base.model, send(torch.from_numpy(ids), base.device), [store.tap for store in stores])
    damaged, encoded = torch.zeros(len(group), device=base.device), {}
    for store in stores:
        kept = [number * width + kept_positions(row.mask, store.tap) for number, row in enumerate(group)]
        at = send(torch.from_numpy(np.concatenate(kept)), base.device)
        flat = found[store.tap].flatten(0, 1).index_select(0, at).to(base.dtype)  # [P, width of the tap]
        # amax hands NaN on, and is five times as fast as isfinite on a CPU.
        bad = (~flat.abs().amax(1).isfinite()).float() if flat.numel() else flat.new_zeros(0, dtype=torch.float32)
        damaged.index_add_(0, at // width, bad)
        encoded[store.tap] = {key: fetch(tensor) for key, tensor in store.codec.encode(flat).items()}
    return _Batch(group, encoded, fetch(damaged == 0))

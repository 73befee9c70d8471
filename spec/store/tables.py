"""The base's own tables, by which training needs no base: embedding, lm_head, and how they make its logits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spec import base as base_model
from spec.base import Base, Logits, Teacher
from spec.store import codecs, identity
from spec.store.collection import Collection

ITEM = "tables"  # in place of a row's key


def collection(root: Path, base: Mapping[str, str], dtype: str) -> Collection:
    """Where the tables of a base are kept."""
    return Collection(root, "tables", identity.tables(base, dtype))


def save(base: Base, kept: Collection, rows: Sequence[NDArray[np.int32]]) -> None:
    """Keep the embedding and lm_head [V, d], lm_head's bias [V] where it has one, and the last layer's weights.

    How lm_head makes the base's logits is found out on the first of `rows`, ids [T] of real sequences.
    """
    claim = kept.claim([ITEM], wait=True)
    if claim is None:
        return
    try:
        tables = {"embedding": base.embedding[: base.vocab_size], "lm_head": base.lm_head}
        kind, layer = base_model.find_logits(base, rows), base_model.layer_of(base.model)
        bias = base_model.bias_of(base.model)
        if bias is not None:
            tables["bias"] = bias
        tables |= base_model.last_layer(base.model)
        row = {name: codecs.to_numpy(each.detach().cpu().to(base.dtype).contiguous()) for name, each in tables.items()}
        attributes = {
            "dtype": str(base.dtype).removeprefix("torch."),
            "offsets": {name: f"{name}_offsets" for name in row},
            "vocab_size": base.vocab_size,
            "hidden_size": base.hidden_size,
            "layers": base.model.config.get_text_config().num_hidden_layers,
            "layer": None if layer is None else layer.model_dump(mode="json"),
            "logits": None if kind is None else asdict(kind),
            "producer": base.producer,
        }
        claim.commit([row], attributes, codecs.ZSTD)
    finally:
        claim.release()


def shape(kept: Collection) -> dict[str, Any]:
    """The base's dtype, hidden_size, vocab_size, layers and their shape, as Manifest has them; reads no table."""
    attributes = _attributes(kept)
    return {name: attributes[name] for name in ("dtype", "hidden_size", "vocab_size", "layers", "layer")}


def logits(kept: Collection) -> Logits | None:
    """How the base's logits follow from its tables and states, so that soft targets follow from the cache alone."""
    found = _attributes(kept)["logits"]
    return None if found is None else Logits(**found)


class Tables(Mapping[str, Tensor]):
    """The base's "embedding" and "lm_head", each [V, d], where lm_head has one its "bias" [V], and what base.last_layer
    gives; each is read when it is asked for."""

    def __init__(self, kept: Collection) -> None:
        self._kept, attributes = kept, _attributes(kept)
        self._names, self._dtype = list(attributes["offsets"]), getattr(torch, attributes["dtype"])
        self._read: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._read:
            arrays, _ = self._kept.read(self._kept.name_of([ITEM]), only=(name,))
            self._read[name] = codecs.from_numpy(arrays[name], self._dtype)
        return self._read[name]

    def teacher(self) -> Teacher | None:
        """What makes the base's own distributions; None where it is not known how its logits follow from its states."""
        found = logits(self._kept)
        return None if found is None else Teacher(self["lm_head"], found, self.get("bias"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _attributes(kept: Collection) -> dict[str, Any]:
    return kept.read(kept.name_of([ITEM]), only=())[1]

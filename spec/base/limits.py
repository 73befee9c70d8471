"""What a base can do at most: its positions, its vocabulary, and whether its memory can forget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from spec.base.check import read_config, skeleton
from spec.kv_cache import make_cache

_BIAS_OF_FIXED_LENGTH = ("mpt",)
"""Architectures that build their attention's bias for so many positions, without a table in the model."""


@dataclass(frozen=True)
class Limits:
    """What a base can read.

    Attributes:
        positions: tokens of a sequence that it was made for; None where nothing says so.
        hard: whether more are impossible (positions are a table), rather than beyond what it was trained for.
        vocab_size: rows V of lm_head: an id of V or more has no row.
    """

    positions: int | None
    hard: bool
    vocab_size: int

    @property
    def most(self) -> int | None:
        """Tokens beyond which it cannot read; None where there is no such number."""
        return self.positions if self.hard else None


def limits(folder: Path, trust_remote_code: bool = False) -> Limits:
    """The limits of the model in a folder, without its weights.

    Raises:
        BaseError: its config cannot be read.
    """
    return limits_of(skeleton(folder, read_config(folder, trust_remote_code), trust_remote_code))


def limits_of(model: Any) -> Limits:
    """The limits of a model."""
    config = model.config.get_text_config()
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    positions = next((int(value) for value in found if isinstance(value, int) and value > 0), None)
    hard = positions is not None and (config.model_type in _BIAS_OF_FIXED_LENGTH or _has_table(model, positions))
    return Limits(positions, hard, int(model.get_output_embeddings().weight.shape[0]))


def _has_table(model: Any, positions: int) -> bool:
    """Whether something in the model has a row for each position and no more: learned positions, or stored waves.

    A few tables have rows to spare (OPT's first two), which no position reaches.
    """
    tables = [
        module.weight.shape[0]
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _is_of_positions(name)
    ]
    tables += [buffer.shape[0] for name, buffer in model.named_buffers() if buffer.ndim == 2 and _is_of_positions(name)]
    return any(positions <= rows <= positions + 8 for rows in tables)


def _is_of_positions(name: str) -> bool:
    last = name.removesuffix(".weight").rpartition(".")[2]
    return last == "wpe" or "pos" in last


def is_recurrent(folder: Path, trust_remote_code: bool = False) -> bool:
    """Whether the model in a folder keeps a state that padding on the left would change; see has_state."""
    return has_state(skeleton(folder, read_config(folder, trust_remote_code), trust_remote_code))


def has_state(model: Any) -> bool:
    """Whether a model remembers the past in a state that it overwrites, in some layer at least."""
    return bool(model._is_stateful) or not all(layer.is_croppable for layer in make_cache(model.config).layers)


def can_take_back(folder: Path, trust_remote_code: bool = False) -> bool:
    """Whether drafts that the model in a folder rejects can be removed from its memory; see takes_back."""
    return takes_back(skeleton(folder, read_config(folder, trust_remote_code), trust_remote_code))


def takes_back(model: Any) -> bool:
    """Whether a model's memory can forget its last tokens, as drafts that are rejected demand.

    A convolution's state can, since it is a few past inputs; a recurrent state cannot.
    """
    if model._is_stateful:
        return False
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    layers = make_cache(model.config).layers
    return all(
        layer.is_croppable or (number < len(kinds) and kinds[number] == "conv") for number, layer in enumerate(layers)
    )

"""What a base can do at most: its positions, its vocabulary, and whether its memory can forget."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from spec.base.check import skeleton
from spec.kv_cache import make_cache

_BIAS_OF_FIXED_LENGTH = ("mpt",)
"""Architectures that build their attention's bias for a fixed number of positions, without a table in the model."""


@dataclass(frozen=True)
class Limits:
    """What a base can read and remember."""

    positions: int | None  # tokens of a sequence that it was made for; None where nothing says so
    hard: bool  # whether more are impossible (positions are a table), rather than beyond what it was trained for
    vocab_size: int  # rows V of lm_head: an id of V or more has no row
    recurrent: bool  # whether some layer overwrites a state, which padding on the left would change
    takes_back: bool  # whether its memory can forget its last tokens, as drafts that are rejected demand

    @property
    def most(self) -> int | None:
        """Tokens beyond which it cannot read; None where there is no such number."""
        return self.positions if self.hard else None

    @property
    def of_rows(self) -> dict[str, int | None]:
        """What spec.corpus.stream has to know of them, by the names of its arguments."""
        return {"max_positions": self.most, "trained_positions": self.positions, "vocab_size": self.vocab_size}


def limits(folder: Path, trust_remote_code: bool = False) -> Limits:
    """The limits of the model in a folder, without its weights."""
    return limits_of(skeleton(folder, trust_remote_code))


def positions_of(config: Any) -> int | None:
    """Tokens of a sequence that the model of a config was made for; None where nothing says so."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((int(value) for value in found if isinstance(value, int) and value > 0), None)


def limits_of(model: Any) -> Limits:
    """The limits of a model."""
    config, positions = model.config.get_text_config(), positions_of(model.config)
    kinds = getattr(config, "layer_types", None) or []
    croppable = [layer.is_croppable for layer in make_cache(model.config).layers]
    # The state of a convolution is a few past inputs, which can be put back.
    forgetful = [each or kinds[i : i + 1] == ["conv"] for i, each in enumerate(croppable)]
    stateful = bool(model._is_stateful)
    return Limits(
        positions=positions,
        hard=positions is not None and (config.model_type in _BIAS_OF_FIXED_LENGTH or _has_table(model, positions)),
        vocab_size=int(model.get_output_embeddings().weight.shape[0]),
        recurrent=stateful or not all(croppable),
        takes_back=not stateful and all(forgetful),
    )


def _has_table(model: Any, positions: int) -> bool:
    """Whether something in the model has a row for each position, or a few more (OPT): learned or stored positions."""
    rows = [(name, each.num_embeddings) for name, each in model.named_modules() if isinstance(each, nn.Embedding)]
    rows += [(name, buffer.shape[0]) for name, buffer in model.named_buffers() if buffer.ndim == 2]
    named = re.compile(r"(?!.*vision).*(\bwpe|pos[^.]*)")
    return any(positions <= count <= positions + 8 and named.fullmatch(name) for name, count in rows)

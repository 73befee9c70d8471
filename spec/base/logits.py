"""How a base makes its logits from its last state: lm_head, and in some families a bias, a scale or a cap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spec.base.folder import BaseError
from spec.base.taps import hidden_states

if TYPE_CHECKING:
    from spec.base.loading import Base

LOOKED_AT = 128
"""Tokens of a sequence by which find_logits judges."""


@dataclass(frozen=True)
class Logits:
    """What turns lm_head times the state into a base's logits: softcap * tanh(scale * (product + bias) / softcap)."""

    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False  # whether lm_head has one

    def apply_(self, product: Tensor, bias: Tensor | None = None) -> Tensor:
        """Change products [.., V] in place; where the logits are plain, not a bit of them changes."""
        if bias is not None:
            product.add_(bias)
        if self.scale != 1:
            product.mul_(self.scale)
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product


PLAIN = Logits()


@dataclass(frozen=True)
class Teacher:
    """What makes the base's distribution of its last state."""

    lm_head: Tensor  # [V, d] of the base, or its rows of the draft vocabulary [K, d]
    logits: Logits = PLAIN
    bias: Tensor | None = None  # [V or K] of lm_head

    def over(self, token_map: Tensor | None, device: torch.device, dtype: torch.dtype) -> Teacher:
        """The same over a draft vocabulary (its ids [K], or None), on a device, lm_head in a dtype, bias in float32."""
        lm_head, bias = self.lm_head, self.bias
        if token_map is not None:
            lm_head = lm_head[token_map.to(lm_head.device)]
            bias = None if bias is None else bias[token_map.to(bias.device)]
        return Teacher(lm_head.to(device, dtype), self.logits, None if bias is None else bias.to(device, torch.float32))

    def finish(self, products: Tensor) -> Tensor:
        """Turn products [.., K] of lm_head and states into logits, in place."""
        return self.logits.apply_(products, self.bias)


def bias_of(model: Any) -> Tensor | None:
    """lm_head's bias [V]."""
    bias: Tensor | None = getattr(model.get_output_embeddings(), "bias", None)
    return bias


@torch.inference_mode()
def find_logits(base: Base, rows: Sequence[NDArray[np.int32]]) -> Logits | None:
    """How the base makes its logits, or None where it is in none of these ways.

    The config says what there may be. Of that, the first is taken by which every logit of the first few rows (ids [T]
    of real sequences) is the float32 product but for the rounding of the dtype that the base computes in.
    """
    if not rows:
        raise BaseError("there is no sequence by which to judge whether lm_head makes the base's logits")
    pairs = []
    for row in rows[:4]:
        ids = torch.from_numpy(row[:LOOKED_AT].astype(np.int64)).to(base.device)[None]
        logits = base.model(input_ids=ids, use_cache=False).logits[0].float()
        states = hidden_states(base.model, ids)[0].float()
        # A part of the matrix at a time: all of it in float32 takes gigabytes of a large base's card.
        pairs.append((logits, torch.cat([states @ part.float().T for part in torch.split(base.lm_head, 8192)], -1)))
    bias = bias_of(base.model)
    bias = None if bias is None else bias.float()
    rounding = max(torch.finfo(base.model.dtype).eps, 2e-5)
    for kind in _possible(base.model.config.get_text_config(), bias is not None):
        allowed = rounding * (1 + (kind.scale != 1) + 3 * (kind.softcap is not None))  # each operation rounds once
        for logits, product in pairs:
            off = (logits - kind.apply_(product.clone(), bias)).abs()
            if (off > allowed * (logits.abs() + logits.square().mean().sqrt())).any():
                break
        else:
            return kind
    return None


def has_linear_logits(base: Base, rows: Sequence[NDArray[np.int32]]) -> bool:
    """Whether the base's logits are lm_head times the state, and nothing more (a bias, a scale, a cap)."""
    return find_logits(base, rows) == PLAIN


def _possible(config: Any, bias: bool) -> Iterator[Logits]:
    """What the names in a config stand for; families use one name for a factor and for a divisor."""

    def numbers(*names: str) -> list[float]:
        found = [getattr(config, name, None) for name in names]
        return [float(value) for value in found if isinstance(value, int | float) and value]

    scales = numbers("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
    caps = numbers("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap", "softcap")
    for cap in (None, *caps):
        for scale in (1.0, *scales, *(1 / value for value in scales)):
            yield Logits(scale, cap, bias)

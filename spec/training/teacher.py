"""The base as a teacher: its own distributions, made anew from its cached states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spec.base.logits import PLAIN, Logits


@dataclass(frozen=True)
class Teacher:
    """What makes the base's distribution of its last state.

    Attributes:
        lm_head: [V, d] of the base, or its rows of the draft vocabulary [K, d].
        logits: what turns lm_head times the state into the base's logits.
        bias: [V or K] of lm_head, in float32.
    """

    lm_head: Tensor
    logits: Logits = PLAIN
    bias: Tensor | None = None

    def over(self, token_map: Tensor | None, device: torch.device, dtype: torch.dtype) -> Teacher:
        """The same over a draft vocabulary (its ids [K], or None), on a device, with lm_head in a dtype."""
        lm_head, bias = self.lm_head, self.bias
        if token_map is not None:
            lm_head = lm_head[token_map.to(lm_head.device)]
            bias = None if bias is None else bias[token_map.to(bias.device)]
        return Teacher(lm_head.to(device, dtype), self.logits, None if bias is None else bias.to(device, torch.float32))

    def finish(self, products: Tensor) -> Tensor:
        """Turn products [.., K] of lm_head and states into logits, in place."""
        return self.logits.apply_(products, self.bias)

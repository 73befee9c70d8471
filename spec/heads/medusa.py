"""Medusa heads (https://arxiv.org/abs/2401.10774), in the layout that vLLM serves."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from spec.heads.config import SpeculatorConfig
from spec.heads.layers import linear
from spec.heads.speculator import Carry, Speculator


class ResidualBlock(nn.Module):
    """``x = x + SiLU(W_j x)`` for each layer j, [.., d] -> [.., d]."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return x


class Medusa(Speculator):
    """``logits_i = head_i(block_i(h_t))``, each predicting x_{t+2+i} from the base's state alone.

    No token is read and nothing is carried from head to head, so drafts do not depend on each other. With
    tie_weights the blocks are each head's own and the output Linear is one (vLLM's ``original_lm_head``).
    """

    def __init__(self, config: SpeculatorConfig, token_map: Tensor | None = None) -> None:
        super().__init__(config, token_map)
        n, d = config.n_predict, config.hidden_size
        self.blocks = nn.ModuleList(ResidualBlock(d, config.num_hidden_layers) for _ in range(n))
        if config.tie_weights:
            self.lm_head = linear(d, config.head_rows)
        else:
            self.lm_heads = nn.ModuleList(linear(d, config.head_rows) for _ in range(n))

    def head(self, i: int) -> nn.Linear:
        """See Speculator."""
        if self.config.tie_weights:
            return self.lm_head
        own = self.lm_heads[i]
        assert isinstance(own, nn.Linear)
        return own

    def start(self, states: Tensor) -> Carry:
        """See Speculator."""
        return (self._scaled(states),)

    def step(self, i: int, carry: Carry, tokens: Tensor) -> tuple[Carry, Tensor]:
        """See Speculator; the tokens are not read."""
        (states,) = carry
        return carry, self.blocks[i](states)

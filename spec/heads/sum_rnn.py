"""The MLP speculator: a small recurrent network over state and token (fms-extras' MLPSpeculator, Arctic's sum_rnn)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spec.heads.layers import PerHead, adapter, embedding_stack, linear, norm_stack, projection_stack
from spec.heads.recurrent import Carry, Recurrent, RecurrentConfig, RecurrentParams, mixing_weight


class SumRnnParams(RecurrentParams):
    """Nothing but what sum_rnn and sum_lstm share."""


class SumRnnConfig(SumRnnParams, RecurrentConfig):
    """The parameters and the base."""


class SumRnn(Recurrent):
    """``s = GELU(ln_i(proj_i(s) + alpha * emb_i(x_{t+1+i})))``, ``logits_i = head_i(s)``, starting from s = h_t.

    With tie_weights the heads share emb, ln and head; the first projection (from the base's width) is its own, the
    others share one. A Linear ``adapter`` stands between sum and norm where their widths differ.
    """

    Params = SumRnnParams
    Config = SumRnnConfig

    def __init__(self, config: SumRnnConfig, token_map: Tensor | None = None) -> None:
        super().__init__(config, token_map)
        n, d, w, inner = config.n_predict, config.hidden_size, config.sum_width, config.inner_dim
        own = 1 if config.tie_weights else n
        projections = min(n, 2) if config.tie_weights else n
        self.alpha = mixing_weight(config)
        self.emb = PerHead(embedding_stack(config.vocab_size, config.emb_dim) for _ in range(own))
        self.proj = PerHead(projection_stack(inner[-1] if i else d, config.proj_dim) for i in range(projections))
        self.adapter = PerHead(adapter(w, inner[0]) for _ in range(own))
        self.ln = PerHead(norm_stack(inner) for _ in range(own))
        heads = [linear(inner[-1], config.head_rows) for _ in range(own)]
        # The public state dict has a key for every head, tied or not.
        self.head = PerHead(heads if own == n else heads * n)

    def state_projections(self) -> PerHead[nn.Module]:
        return self.proj

    def step(self, i: int, carry: Carry, tokens: Tensor) -> tuple[Carry, Tensor]:
        (state,) = carry
        mixed = torch.add(self.proj(i)(state), self.emb(i)(tokens), alpha=self.alpha)  # [P, w]
        state = F.gelu(self.ln(i)(self.adapter(i)(mixed)))  # [P, inner]
        return (state,), state

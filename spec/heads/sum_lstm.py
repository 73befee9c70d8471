"""The LSTM speculator (Arctic's sum_lstm)."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from spec.heads.layers import PerHead, RMSNorm, adapter, embedding_stack, linear, projection_stack, widths
from spec.heads.recurrent import Carry, Recurrent, RecurrentConfig, RecurrentParams, mixing_weight


class SumLstmParams(RecurrentParams):
    """Of sum_lstm."""

    tie_lstm_embs: bool = False  # the four gates share one embedding

    @model_validator(mode="after")
    def _tied(self) -> Self:
        if not self.tie_weights:
            raise ValueError("method sum_lstm shares its weights over the heads: set tie_weights to true")
        return self


class SumLstmConfig(SumLstmParams, RecurrentConfig):
    """The parameters and the base."""


class SumLstm(Recurrent):
    """An LSTM cell whose four gates each read ``proj(s) + alpha * emb(x_{t+1+i})``; all weights are tied.

    ``c = c * sigmoid(forget) + GELU(cell_ln(cell)) * sigmoid(input)``; ``s = GELU(state_ln(c)) * sigmoid(output)``,
    then the inner stack; ``logits_i = head(s)``. It starts from s = h_t and c = 0. All gates read the same s; the
    projections of the first head (from the base's width) are their own, later heads share theirs.

    forget_proj of the first head multiplies c = 0, so its gradient is exactly zero. It stays because the public
    layout has it.
    """

    Params = SumLstmParams
    Config = SumLstmConfig
    config: SumLstmConfig

    def __init__(self, config: SumLstmConfig, token_map: Tensor | None = None) -> None:
        super().__init__(config, token_map)
        w, inner = config.sum_width, config.inner_dim
        self.alpha = mixing_weight(config)
        self.forget_emb = self._embedding()
        self.input_emb, self.output_emb, self.cell_emb = (
            self.forget_emb if config.tie_lstm_embs else self._embedding() for _ in range(3)
        )
        self.forget_proj, self.input_proj, self.output_proj, self.cell_proj = (self._projections() for _ in range(4))
        self.cell_ln = PerHead([RMSNorm(w)])
        self.state_ln = PerHead([RMSNorm(w)])
        self.adapter = PerHead([adapter(w, inner[0])])
        self.inner = PerHead([nn.Sequential(*widths(inner))])
        # The public state dict has a key for every head, tied or not.
        self.head = PerHead([linear(inner[-1], config.head_rows)] * config.n_predict)

    def state_projections(self) -> PerHead[nn.Module]:
        return self.cell_proj

    def start(self, states: Tensor) -> Carry:
        (state,) = super().start(states)
        return state, state.new_zeros(len(state), self.config.sum_width)

    def step(self, i: int, carry: Carry, tokens: Tensor) -> tuple[Carry, Tensor]:
        state, cell = carry
        embedded = [self.forget_emb(0)(tokens)] * 4  # one look-up: four would make four gradients the size of the table
        if not self.config.tie_lstm_embs:
            embedded[1:] = [emb(0)(tokens) for emb in (self.input_emb, self.output_emb, self.cell_emb)]
        gates = (self.forget_proj, self.input_proj, self.output_proj, self.cell_proj)
        forget, input_, output, candidate = (
            torch.add(proj(i)(state), emb, alpha=self.alpha) for proj, emb in zip(gates, embedded, strict=True)
        )
        cell = cell * torch.sigmoid(forget) + F.gelu(self.cell_ln(0)(candidate)) * torch.sigmoid(input_)
        state = F.gelu(self.state_ln(0)(cell)) * torch.sigmoid(output)
        state = self.inner(0)(self.adapter(0)(state))
        return (state, cell), state

    def undecayed(self) -> frozenset[str]:
        """The norms, and forget_proj of the first head: without a gradient, decay alone would move it."""
        idle = (name for name, _ in self.named_parameters() if name.startswith("forget_proj.0."))
        return super().undecayed() | frozenset(idle)

    def _embedding(self) -> PerHead[nn.Module]:
        return PerHead([_unwrapped(embedding_stack(self.config.vocab_size, self.config.emb_dim))])

    def _projections(self) -> PerHead[nn.Module]:
        first = _unwrapped(projection_stack(self.config.hidden_size, self.config.proj_dim))
        later = _unwrapped(projection_stack(self.config.inner_dim[-1], self.config.proj_dim))
        # A single head never reaches the second projection, which data-parallel training takes for an error.
        later.requires_grad_(self.config.n_predict > 1)
        return PerHead([first, later])


def _unwrapped(stack: nn.Sequential) -> nn.Module:
    """The public keys have no index of a stack here: a stack of one module is that module."""
    return stack[0] if len(stack) == 1 else stack

"""One matrix product for the LSTM's four gates, for drafting."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spec.heads.speculator import Carry, Speculator
from spec.heads.sum_lstm import SumLstm


def fused_projection(speculator: SumLstm, j: int) -> Tensor:
    """The gates' projections as one weight, in the order forget, input, output, cell (ArcticInference's ``projs``).

    Args:
        speculator: an LSTM whose projections are single Linears.
        j: 0 for the first head's (reads the base's state), 1 for the later heads'.

    Returns:
        [4w, d] for j = 0, [4w, h] for j = 1; a copy.

    Raises:
        ValueError: proj_dim is a stack, which has no single weight.
    """
    if len(speculator.config.proj_dim) > 1:
        raise ValueError(f"proj_dim is {speculator.config.proj_dim}: a stack of widths has no single weight to fuse")
    return torch.cat([_weight(proj(j)) for proj in speculator.projections()])


def fuse(speculator: Speculator) -> Speculator:
    """The speculator as it drafts fastest: an LSTM's gates fused, everything else as it is.

    The result shares all other weights with the speculator and gives the same drafts up to rounding. It is for
    drafting only: later changes to the speculator's projections do not reach it, and it is neither trained nor saved.
    """
    if isinstance(speculator, SumLstm) and len(speculator.config.proj_dim) == 1:
        return FusedSumLstm(speculator)
    return speculator


class FusedSumLstm(Speculator):
    """A SumLstm with one projection for all gates; see fuse."""

    first: Tensor
    later: Tensor

    def __init__(self, lstm: SumLstm) -> None:
        super().__init__(lstm.config, lstm.token_map)
        self.lstm = lstm
        self.head = lstm.head
        self.register_buffer("first", fused_projection(lstm, 0))
        self.register_buffer("later", fused_projection(lstm, 1))

    def start(self, states: Tensor) -> Carry:
        return self.lstm.start(states)

    def step(self, i: int, carry: Carry, tokens: Tensor) -> tuple[Carry, Tensor]:
        state, cell = carry
        sums = F.linear(state, self.later if i else self.first)  # [P, 4w]
        forget, input_, output, candidate = (
            torch.add(part, emb, alpha=self.lstm.alpha)
            for part, emb in zip(sums.chunk(4, -1), self.lstm.embed(tokens), strict=True)
        )
        return self.lstm.update(cell, (forget, input_, output, candidate))


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Linear)
    return module.weight.detach()

"""The parts that the speculators are built from.

Stacks follow ArcticTraining's layout (projects/arctic_lstm_speculator), so that a checkpoint's keys are the public
ones; where widths differ, each norm has the width of what it normalises. All Linears are without bias.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from spec.section import Dims

M = TypeVar("M", bound=nn.Module, covariant=True)


def rms_normalize(x: Tensor) -> Tensor:
    """``x / sqrt(mean(x^2) + 1e-6)`` over the last dimension, without parameters."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class RMSNorm(nn.Module):
    """``rms_normalize(x) * weight + bias``, [.., width] -> [.., width]: no mean is subtracted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return rms_normalize(x) * self.weight + self.bias


class PerHead(nn.ModuleList, Generic[M]):
    """One module a head; heads beyond the last module share that one. Call it with a head's number."""

    def __init__(self, modules: Iterable[M]) -> None:
        super().__init__(modules)

    def __call__(self, i: int) -> M:
        """Head i's module."""
        return self[min(i, len(self) - 1)]  # type: ignore[return-value]


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A Linear without bias."""
    return nn.Linear(inputs, outputs, bias=False)


def embedding_stack(rows: int, dims: Dims) -> nn.Sequential:
    """Token ids [..] -> [.., dims[-1]]: a table of width dims[0]; norm -> GELU -> Linear for each further width."""
    return nn.Sequential(nn.Embedding(rows, dims[0]), *widths(dims))


def projection_stack(inputs: int, dims: Dims) -> nn.Sequential:
    """[.., inputs] -> [.., dims[-1]]: Linear to dims[0]; norm -> GELU -> Linear for each further width."""
    return nn.Sequential(linear(inputs, dims[0]), *widths(dims))


def norm_stack(dims: Dims) -> nn.Sequential:
    """[.., dims[0]] -> [.., dims[-1]]: norm, then GELU -> Linear -> norm for each further width."""
    rest = [module for a, b in pairwise(dims) for module in (nn.GELU(), linear(a, b), RMSNorm(b))]
    return nn.Sequential(RMSNorm(dims[0]), *rest)


def adapter(inputs: int, outputs: int) -> nn.Module:
    """A Linear where the widths differ; where they agree nothing, and no key in the checkpoint."""
    return nn.Identity() if inputs == outputs else linear(inputs, outputs)


def widths(dims: Dims) -> list[nn.Module]:
    """[.., dims[0]] -> [.., dims[-1]]: norm -> GELU -> Linear for each width after the first."""
    return [module for a, b in pairwise(dims) for module in (RMSNorm(a), nn.GELU(), linear(a, b))]

"""What starting weights are made from: random draws, and the base's tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spec.heads.layers import RMSNorm


@torch.no_grad()
def draw(speculator: nn.Module, seed: int = 0) -> None:
    """Draw every table and Linear from a normal distribution with the standard deviation 1/sqrt(min(weight.shape))
    (ArcticTraining), in place; norms get weight 1 and bias 0. A seed gives the same weights on every device."""
    generator = torch.Generator().manual_seed(seed)
    for module in speculator.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            spread = 1 / math.sqrt(min(module.weight.shape))
            module.weight.copy_(torch.empty(module.weight.shape).normal_(0, spread, generator=generator))
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1)
            module.bias.zero_()


def principal_directions(rows: Tensor, k: int) -> Tensor:
    """Orthonormal directions that hold most of the rows' variance: [V, d] centred rows -> [d, min(k, d)], the identity
    for k >= d. Each direction's largest entry is positive, which makes the answer unique."""
    d = rows.shape[1]
    if k >= d:
        return torch.eye(d, device=rows.device)
    _, vectors = torch.linalg.eigh(rows.T @ rows)  # ascending
    leading = vectors[:, -k:].flip(1)
    signs = leading.gather(0, leading.abs().argmax(0, keepdim=True)).sign()
    directions: Tensor = leading * signs
    return directions


def centred(table: Tensor) -> Tensor:
    """The rows in float32, less their mean."""
    rows = table.detach().float()
    return rows - rows.mean(0)


def unit_rows(rows: Tensor) -> Tensor:
    """The rows, rescaled by one factor to mean square 1."""
    mean_square = rows.pow(2).sum(1).mean().clamp_min(torch.finfo(rows.dtype).tiny)
    return rows * mean_square.rsqrt()


def rotation(k: int, width: int, generator: torch.Generator) -> Tensor:
    """A random [k, width] matrix with orthonormal rows (k <= width)."""
    columns: Tensor = torch.linalg.qr(torch.randn(width, k, generator=generator)).Q
    return columns.T.contiguous()

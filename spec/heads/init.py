"""Where training starts: weights drawn at random, or taken from the base's own tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spec.heads.layers import RMSNorm
from spec.heads.speculator import Speculator
from spec.heads.sum_lstm import SumLstm
from spec.heads.sum_rnn import SumRnn


@torch.no_grad()
def init_random(speculator: Speculator, seed: int = 0) -> None:
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


@torch.no_grad()
def init_from_base(speculator: Speculator, embedding: Tensor, lm_head: Tensor, seed: int = 0) -> None:
    """Start from the base's tables: like init_random, and then:

    - Heads and token tables get the geometry of the base's tables at the random weights' scale, so that the first loss
      is below or near ln V. A table is centred (the mean row adds the same to every logit, which a softmax does not
      see, and is nearly half of a real lm_head's norm), reduced to its leading principal components where it is
      wider than the speculator's, and rescaled to rows of mean square 1. Where lm_head is narrower than the
      head, the head's remaining columns stay random; at equal widths nothing is left out.
    - Token tables are turned by a random rotation. In most bases they share their coordinates with lm_head, so that
      a token added to the state would make every head predict the token that it has just read.
    - The first projection (of sum_lstm: the cell's) maps the base's state onto lm_head's directions, and later ones
      carry it on unchanged where no stack lies between: head and state share their coordinates from the start.
    - The other Linears (of stacks, adapters and gates) stay random.

    Args:
        speculator: changed in place.
        embedding: [V, d] the base's token embedding.
        lm_head: [V, d] the weight of its lm_head (the same tensor where the base ties them).
        seed: of what stays random.

    Raises:
        ValueError: tables of another shape than the config's [vocab_size, hidden_size].
    """
    config = speculator.config
    for name, table in (("embedding", embedding), ("lm_head", lm_head)):
        if table.shape != (config.vocab_size, config.hidden_size):
            raise ValueError(
                f"{name} has shape {list(table.shape)}, expected [{config.vocab_size}, {config.hidden_size}] "
                "(vocab_size, hidden_size)"
            )
    drafted = lm_head if speculator.token_map is None else lm_head[speculator.token_map.to(lm_head.device)]
    init_random(speculator, seed)
    generator = torch.Generator().manual_seed(seed)
    assert isinstance(speculator, SumRnn | SumLstm)
    projections = speculator.proj if isinstance(speculator, SumRnn) else speculator.cell_proj
    rows = _centred(drafted)
    columns = _unit_rows(rows @ principal_directions(rows, config.head_width))  # [V or K, k]
    k = columns.shape[1]
    for i in range(config.n_predict):
        speculator.head(i).weight[:, :k].copy_(columns * math.sqrt(k / config.head_width))
    directions = principal_directions(rows, config.proj_dim[0])  # [d, k]
    _first_linear(projections(0)).weight[: directions.shape[1]].copy_(directions.T)
    tokens = _centred(embedding)
    tokens = _unit_rows(tokens @ principal_directions(tokens, config.emb_dim[0]))
    for module in speculator.modules():
        if isinstance(module, nn.Embedding):
            module.weight.copy_(tokens @ _rotation(tokens.shape[1], config.emb_dim[0], generator).to(tokens.device))
    if config.inner_dim == config.proj_dim and len(config.proj_dim) == 1:
        for projection in projections[1:]:
            nn.init.eye_(_first_linear(projection).weight)


def principal_directions(rows: Tensor, k: int) -> Tensor:
    """Orthonormal directions that hold most of the rows' variance: [V, d] centred rows -> [d, min(k, d)].

    The identity for k >= d: nothing is left out, so there is nothing to choose. Each direction's largest entry is
    positive, which makes the answer unique.
    """
    d = rows.shape[1]
    if k >= d:
        return torch.eye(d, device=rows.device)
    _, vectors = torch.linalg.eigh(rows.T @ rows)  # ascending
    leading = vectors[:, -k:].flip(1)
    signs = leading.gather(0, leading.abs().argmax(0, keepdim=True)).sign()
    directions: Tensor = leading * signs
    return directions


def _centred(table: Tensor) -> Tensor:
    rows = table.detach().float()
    return rows - rows.mean(0)


def _unit_rows(rows: Tensor) -> Tensor:
    """The rows, rescaled by one factor to mean square 1."""
    mean_square = rows.pow(2).sum(1).mean().clamp_min(torch.finfo(rows.dtype).tiny)
    return rows * mean_square.rsqrt()


def _rotation(k: int, width: int, generator: torch.Generator) -> Tensor:
    """A random [k, width] matrix with orthonormal rows (k <= width)."""
    columns: Tensor = torch.linalg.qr(torch.randn(width, k, generator=generator)).Q
    return columns.T.contiguous()


def _first_linear(projection: nn.Module) -> nn.Linear:
    module = projection[0] if isinstance(projection, nn.Sequential) else projection
    assert isinstance(module, nn.Linear)
    return module

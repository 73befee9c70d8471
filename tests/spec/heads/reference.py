"""The networks straight from their formulas, over a state dict, and what their tests begin with."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from spec.heads import Speculator, SpeculatorConfig, build, parse_config

State = dict[str, Tensor]
SHAPE: dict[str, object] = {"hidden_size": 12, "vocab_size": 23, "n_predict": 3}
SHAPE |= {"base_model_name_or_path": "some/base", "base_digest": "d1"}
WIDTHS = dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), (8,))


def config(method: str = "sum_rnn", **changes: object) -> SpeculatorConfig:
    return parse_config({"method": method, **SHAPE, **WIDTHS, **changes})


def eagle3(layer: Mapping[str, object], layers: int, **changes: object) -> Any:
    """An attention head on a base with so many layers of this shape."""
    return parse_config({"method": "eagle3", **SHAPE, "layers": layers, "layer": layer, **changes})


def randomized(c: SpeculatorConfig, token_map: Tensor | None = None) -> Speculator:
    """Every parameter away from its special value: norms too. A draft vocabulary is of random tokens unless given."""
    if token_map is None and c.draft_vocab_size is not None:
        token_map = torch.randperm(c.vocab_size)[: c.draft_vocab_size].sort().values
    speculator = build(c, token_map)
    with torch.no_grad():
        for name, parameter in speculator.named_parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0, 0.5)  # norms' weights
    return speculator


def inputs(c: SpeculatorConfig, positions: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """States [P, d] and tokens [P, n]."""
    g = torch.Generator().manual_seed(seed)
    states = 2 * torch.randn(positions, c.hidden_size, generator=g)
    return states, torch.randint(c.vocab_size, (positions, c.n_predict), generator=g)


def logits(c: SpeculatorConfig, w: State, states: Tensor, tokens: Tensor) -> Tensor:
    """[n, P, V], position by position."""
    run = {"sum_rnn": sum_rnn, "sum_lstm": sum_lstm}[c.method]
    return torch.stack([run(c, w, states[p], tokens[p].tolist()) for p in range(len(states))], 1)


def sum_rnn(c: SpeculatorConfig, w: State, h: Tensor, x: list[int]) -> Tensor:
    s, out = first_state(c, h), []
    for i in range(c.n_predict):
        j = 0 if c.tie_weights else i
        p = min(i, 1) if c.tie_weights else i
        z = alpha(c) * stack(w, f"emb.{j}", c.emb_dim, lambda m: m[x[i]])  # noqa: B023 - called at once
        z = z + stack(w, f"proj.{p}", c.proj_dim, lambda m: m @ s)  # noqa: B023
        if c.inner_dim[0] != c.emb_dim[-1]:
            z = w[f"adapter.{j}.weight"] @ z
        s = gelu(norm(w, f"ln.{j}.0", z))
        for k in range(1, len(c.inner_dim)):
            s = gelu(norm(w, f"ln.{j}.{3 * k}", w[f"ln.{j}.{3 * k - 1}.weight"] @ s))
        out.append(w[f"head.{j}.weight"] @ s)
    return torch.stack(out)


def sum_lstm(c: SpeculatorConfig, w: State, h: Tensor, x: list[int]) -> Tensor:
    s, cell, out = first_state(c, h), torch.zeros(c.emb_dim[-1]), []
    for i in range(c.n_predict):

        def gate(name: str, i: int = i) -> Tensor:
            table = "forget" if c.tie_lstm_embs else name
            e = stack(w, f"{table}_emb.0", c.emb_dim, lambda m: m[x[i]], bare=True)
            return stack(w, f"{name}_proj.{min(i, 1)}", c.proj_dim, lambda m: m @ s, bare=True) + alpha(c) * e  # noqa: B023

        f, u, o = (1 / (1 + torch.exp(-gate(name))) for name in ("forget", "input", "output"))
        cell = cell * f + gelu(norm(w, "cell_ln.0", gate("cell"))) * u
        s = gelu(norm(w, "state_ln.0", cell)) * o
        if c.inner_dim[0] != c.emb_dim[-1]:
            s = w["adapter.0.weight"] @ s
        for k in range(1, len(c.inner_dim)):
            s = w[f"inner.0.{3 * k - 1}.weight"] @ gelu(norm(w, f"inner.0.{3 * k - 3}", s))
        out.append(w["head.0.weight"] @ s)
    return torch.stack(out)


def stack(w: State, key: str, dims: tuple[int, ...], first: Callable[[Tensor], Tensor], bare: bool = False) -> Tensor:
    if bare and len(dims) == 1:
        return first(w[f"{key}.weight"])
    x = first(w[f"{key}.0.weight"])
    for k in range(1, len(dims)):
        x = w[f"{key}.{3 * k}.weight"] @ gelu(norm(w, f"{key}.{3 * k - 2}", x))
    return x


def first_state(c: SpeculatorConfig, h: Tensor) -> Tensor:
    return h / (h.square().mean() + 1e-6).sqrt() / math.sqrt(2) if c.scale_input else h


def alpha(c: SpeculatorConfig) -> float:
    state_weight = 0.5 ** (0.5 / c.n_predict)
    emb_weight = math.sqrt((1 - state_weight**2) * c.emb_dim[-1] / 2)
    if len(c.emb_dim) > 1:
        emb_weight = math.sqrt((1 - state_weight**2) / 2)
    return emb_weight / state_weight


def norm(w: State, key: str, x: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * w[f"{key}.weight"] + w[f"{key}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

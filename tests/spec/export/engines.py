"""A reader of exports, written from the rules of the engine's own loader.

It checks what the engine checks (types and values of config.json, names and shapes of tensors), and drafts as the
engine does, in float32.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from spec import heads
from spec.heads import Speculator, SpeculatorConfig
from tests.spec.heads.reference import randomized

Draft = Callable[[Tensor, Tensor], Tensor]
"""States [P, d] and tokens [P] -> drafts [P, n]."""


def checkpoint(folder: Path, c: SpeculatorConfig) -> Speculator:
    """A checkpoint of random weights in a folder; no parameter has a special value."""
    drafted = None if c.draft_vocab_size is None else torch.randperm(c.vocab_size)[: c.draft_vocab_size].sort().values
    speculator = randomized(c, drafted)
    heads.save(speculator, folder)
    return speculator


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def arctic(folder: Path) -> Draft:
    """arctic_inference/vllm/spec_dec/arctic_speculator.py (ArcticLSTMSpeculator) and arctic_proposer.py."""
    values = config_of(folder)
    assert values["model_type"] == "mlp_speculator"
    assert values["architectures"] == ["ArcticLSTMSpeculatorPreTrainedModel"]
    n, vocab, d = values["n_predict"], values["vocab_size"], values["input_hidden_dim"]
    assert len(values["top_k_tokens_per_head"]) == n
    assert values["num_attention_heads"] == 1
    h = int(values["emb_dim"])  # the engine's patch of the config
    assert [values[name] for name in ("inner_dim", "emb_dim", "proj_dim")] == [str(h)] * 3
    tied, lstm = values["tie_weights"], values["method"] == "sum_lstm"
    own = 1 if tied else n
    found = tensors(folder)
    shapes: dict[str, tuple[int, ...]] = {f"head.{i}.weight": (vocab, h) for i in range(own)}
    norms = ["cell_ln.0", "state_ln.0"] if lstm else [f"ln.{i}.0" for i in range(own)]
    shapes |= {f"{norm}.{part}": (h,) for norm in norms for part in ("weight", "bias")}
    if lstm:
        assert tied
        assert values["tie_lstm_embs"]
        gates = ("forget", "input", "output", "cell")
        shapes |= {f"{gate}_proj.{j}.weight": (h, h if j else d) for gate in gates for j in (0, 1)}
        shapes["forget_emb.0.weight"] = (vocab, h)
    else:
        shapes |= {f"emb.{i}.0.weight": (vocab, h) for i in range(own)}
        shapes |= {f"proj.{i}.0.weight": (h, h if i else d) for i in range(min(n, 2) if tied else n)}
    assert {name: tuple(weight.shape) for name, weight in found.items()} == shapes
    w = {name: weight.float() for name, weight in found.items()}
    if lstm:
        fused = [torch.cat([w[f"{gate}_proj.{j}.weight"] for gate in gates]) for j in (0, 1)]
    state_weight = 0.5 ** (0.5 / n)
    alpha = math.sqrt((1 - state_weight**2) * (h / 2)) / state_weight

    def draft(states: Tensor, tokens: Tensor) -> Tensor:
        drafts = []
        cell = torch.zeros(len(states), h)
        for i in range(n):
            if i == 0 and values["scale_input"]:
                states = _norm(states) / 2**0.5
            k = 0 if tied else i
            j = 1 if tied and i >= 2 else i
            if lstm:
                sums = states @ fused[j].T + alpha * w["forget_emb.0.weight"][tokens].repeat(1, 4)
                forget, input_, output = sums[:, : 3 * h].sigmoid().chunk(3, -1)
                candidate = F.gelu(_norm(sums[:, 3 * h :], w, "cell_ln.0")) * input_
                cell = cell * forget + candidate
                states = F.gelu(_norm(cell, w, "state_ln.0")) * output
            else:
                sums = states @ w[f"proj.{j}.0.weight"].T + alpha * w[f"emb.{k}.0.weight"][tokens]
                states = F.gelu(_norm(sums, w, f"ln.{k}.0"))
            tokens = (states @ w[f"head.{k}.weight"].T).argmax(-1)
            drafts.append(tokens)
        return torch.stack(drafts, 1)

    return draft


def _norm(x: Tensor, w: dict[str, Tensor] | None = None, key: str = "") -> Tensor:
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x if w is None else w[f"{key}.weight"] * x + w[f"{key}.bias"]

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
    speculator = randomized(c)
    heads.save(speculator, folder)
    return speculator


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


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


def vllm(folder: Path, embedding: Tensor) -> Callable[[Tensor, Tensor, int], list[int]]:
    """vllm/model_executor/models/llama_eagle3.py and v1/spec_decode/llm_base_proposer.py, with the base's embedding.

    The layers' outputs [T, A d] and the token after each position [T] -> n drafts after the last one.
    """
    values, found = config_of(folder), tensors(folder)
    assert values["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (values["model_type"], values["num_hidden_layers"], values["hidden_act"]) == ("llama", 1, "silu")
    assert values["num_aux_hidden_states"] == len(values["eagle_aux_hidden_state_layer_ids"])
    assert values["tie_word_embeddings"] is False
    assert values["rope_parameters"]["rope_type"] == "default"
    assert "n_predict" not in values  # or num_speculative_tokens has to be its multiple
    d, V, K, wide = (values[f"{name}_size"] for name in ("hidden", "vocab", "draft_vocab", "intermediate"))
    heads, kv, width = (values[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    assert (values["target_hidden_size"], tuple(embedding.shape)) == (d, (V, d))
    attention = {"q": (heads * width, 2 * d), **dict.fromkeys("kv", (kv * width, 2 * d)), "o": (d, heads * width)}
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (d, values["num_aux_hidden_states"] * d),
        "norm.weight": (d,),
        "lm_head.weight": (K, d),
        **{f"midlayer.self_attn.{name}_proj.weight": shape for name, shape in attention.items()},
        **{f"midlayer.mlp.{name}_proj.weight": (wide, d) for name in ("gate", "up")},
        "midlayer.mlp.down_proj.weight": (d, wide),
        **{f"midlayer.{name}.weight": (d,) for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")},
    }
    if values["attention_bias"]:
        shapes |= {f"midlayer.self_attn.{name}_proj.bias": (rows,) for name, (rows, _) in attention.items()}
    if K != V:
        shapes |= {"d2t": (K,), "t2d": (V,)}
        assert (found["d2t"].dtype, found["t2d"].dtype) == (torch.int64, torch.bool)
    assert {name: tuple(weight.shape) for name, weight in found.items()} == shapes
    w = {name: weight.float() for name, weight in found.items() if name not in ("d2t", "t2d")}

    def rms(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + values["rms_norm_eps"]) * w[f"{name}.weight"]

    def project(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"midlayer.{name}_proj.weight"], w.get(f"midlayer.{name}_proj.bias"))

    def rotate(x: Tensor, places: Tensor) -> Tensor:
        rates = values["rope_parameters"]["rope_theta"] ** (-torch.arange(0, width, 2) / width)
        angles = (places[:, None] * rates).repeat(1, 2)[:, None]
        return x * angles.cos() + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1) * angles.sin()

    def draft(outputs: Tensor, tokens: Tensor, n: int) -> list[int]:
        vectors, drafts = outputs @ w["fc.weight"].T, list[int]()
        keys, mixable, places = torch.empty(0, kv, width), torch.empty(0, kv, width), torch.arange(len(tokens))
        for _ in range(n):
            embedded = rms(embedding[tokens], "midlayer.input_layernorm")
            pairs = torch.cat([embedded, rms(vectors, "midlayer.hidden_norm")], -1)
            q, k, v = (project(pairs, f"self_attn.{name}").view(len(pairs), -1, width) for name in "qkv")
            keys, mixable = torch.cat([keys, rotate(k, places)]), torch.cat([mixable, v])
            shared = [each.repeat_interleave(heads // kv, 1).transpose(0, 1) for each in (keys, mixable)]
            seen = torch.arange(len(keys)) <= places[:, None]
            mixed = F.scaled_dot_product_attention(rotate(q, places).transpose(0, 1), *shared, attn_mask=seen)
            vectors = vectors + project(mixed.transpose(0, 1).flatten(1), "self_attn.o")
            x = rms(vectors, "midlayer.post_attention_layernorm")
            vectors = (vectors + project(F.silu(project(x, "mlp.gate")) * project(x, "mlp.up"), "mlp.down"))[-1:]
            normed = rms(vectors, "norm")
            row = int((normed @ w["lm_head.weight"].T).argmax())
            vectors = normed if values["norm_output"] else vectors
            drafts.append(row + int(found["d2t"][row]) if K != V else row)
            tokens, places = torch.tensor(drafts[-1:]), places[-1:] + 1
        return drafts

    return draft


def _norm(x: Tensor, w: dict[str, Tensor] | None = None, key: str = "") -> Tensor:
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x if w is None else w[f"{key}.weight"] * x + w[f"{key}.bias"]

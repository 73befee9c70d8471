"""EAGLE-3 heads in the folder that stock vLLM loads (vllm/model_executor/models/llama_eagle3.py), and back.

The tensors keep their names, which are the authors'. The base's embedding is not among them: the engine lends it. A
draft vocabulary is d2t [K], what each draft id lacks to its full id, and t2d [V], which tokens are drafted. The engine
reports no missing tensor.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spec.export.format import ExportError, Format
from spec.heads import CheckpointError, SpeculatorConfig
from spec.heads.eagle3 import Eagle3Config, Eagle3Params

ARCHITECTURE = "LlamaForCausalLMEagle3"

_LAYERS, _DEPTHS = "target_num_hidden_layers", "trained_n_predict"
"""Keys of our own in config.json; `n_predict` would make vLLM ask for multiples of it."""

_ANOTHER_NETWORK = {
    "norm_before_residual": False,
    "norm_before_fc": False,
    "fc_norm": False,
    "use_aux_hidden_state": True,
    "mlp_bias": False,
    "hidden_act": "silu",
    "num_hidden_layers": 1,
    "logit_scale": 1.0,
    "ptd_token_id": None,
    "quantization_config": None,
}
"""Keys by which a public head is another network than ours, with the value that ours has."""


KEYS = frozenset(
    [
        *("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "attention_bias"),
        *("rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "max_position_embeddings", "eagle_config"),
        *("eagle_aux_hidden_state_layer_ids", "num_aux_hidden_states", "target_hidden_size", "tie_word_embeddings"),
        "norm_output",
        *(_LAYERS, _DEPTHS),
        *_ANOTHER_NETWORK,
    ]
)
"""Keys of config.json that are read."""


def check(config: SpeculatorConfig) -> Eagle3Config:
    """The config, where vLLM can load such a head.

    Raises:
        ExportError: the reason, and what would fit.
    """
    if not isinstance(config, Eagle3Config):
        raise ExportError(
            f"format vllm holds eagle3, and this speculator's method is {config.method}: none of vLLM's own "
            "methods drafts with such a head. The format arctic holds sum_rnn and sum_lstm; vLLM serves these "
            "without an export, too"
        )
    layer = config.layer
    if layer.head_dim % 8 or layer.head_dim > 512 or layer.heads % layer.kv_heads:
        raise ExportError(
            f"format vllm: found {layer.heads} heads of width {layer.head_dim} with {layer.kv_heads} for keys and "
            "values; vLLM has no attention of this shape. The width must be a multiple of 8 and at most 512, and the "
            "number of heads a multiple of that for keys and values"
        )
    try:
        config.taps(config.layers)
    except ValueError as error:
        raise ExportError(f"format vllm: {error}") from None
    return config


def describe(config: SpeculatorConfig) -> str:
    """What it reads."""
    return f"one attention layer, reads the base after layers {', '.join(map(str, _tapped(check(config))))}"


def engine_config(config: SpeculatorConfig, base_architectures: Sequence[str] = ()) -> dict[str, Any]:
    """What the engine reads in config.json."""
    config = check(config)
    layer, tapped = config.layer, _tapped(config)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": config.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "num_attention_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "attention_bias": layer.bias,
        "rms_norm_eps": layer.eps,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": layer.rope_theta},
        "max_position_embeddings": layer.positions,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.head_rows,
        "target_hidden_size": config.hidden_size,
        "eagle_aux_hidden_state_layer_ids": tapped,
        "num_aux_hidden_states": len(tapped),
        "tie_word_embeddings": False,
        "norm_output": config.norm_output,
        _LAYERS: config.layers,
        _DEPTHS: config.n_predict,
    }


def tensors(config: SpeculatorConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The engine's tensors; it has no place for a draft vocabulary that is the whole one."""
    found = dict(weights)
    token_map = found.pop("token_map", None)
    if token_map is not None and len(token_map) < config.vocab_size:
        found["d2t"] = token_map - torch.arange(len(token_map))
        found["t2d"] = _drafted(token_map, config.vocab_size)
    return found


def speculative(folder: Path, length: int) -> str:
    """vLLM's --speculative-config for the export in a folder."""
    return json.dumps({"method": "eagle3", "model": str(folder), "num_speculative_tokens": length})


def command(config: SpeculatorConfig, folder: Path, base_architectures: Sequence[str] = ()) -> str:
    """The shell command that serves the base with the export in a folder."""
    revision = f" --revision {shlex.quote(config.base_revision)}" if config.base_revision else ""
    return (
        f"vllm serve {shlex.quote(config.base_model_name_or_path)}{revision} \\\n"
        f"    --speculative-config {shlex.quote(speculative(folder, config.n_predict))}"
    )


VLLM = Format("vllm", check, describe, engine_config, tensors, command)


def fields(values: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    """The fields of our config, but the base's, from the config.json of such a folder.

    Args:
        values: of config.json.
        layers: of the base, where it is at hand.

    Raises:
        CheckpointError: another network than ours, or too little is known of the base.
    """
    eagle = values.get("eagle_config")
    values = {**values, **(eagle if isinstance(eagle, dict) else {})}
    for name, ours in _ANOTHER_NETWORK.items():
        if values.get(name, ours) != ours and (values[name] or ours):
            raise CheckpointError(f"{name} is {values[name]!r}: another network than eagle3 here, which has {ours!r}")
    d, heads = _whole(values, "hidden_size"), _whole(values, "num_attention_heads")
    if values.get("target_hidden_size", d) != d:
        raise CheckpointError(
            f"target_hidden_size is {values['target_hidden_size']!r}, eagle3 here has the base's, {d}"
        )
    layers = values.get(_LAYERS) or layers
    if not isinstance(layers, int):
        raise CheckpointError("config.json does not say how many layers the base has; name the base with --base")
    ids = values.get("eagle_aux_hidden_state_layer_ids") or [2, layers // 2, layers - 3]
    known = [tap.layer for tap in Eagle3Params(method="eagle3").taps(layers)[:-1]]
    drafted = values.get("draft_vocab_size")
    return {
        "method": "eagle3",
        "n_predict": values.get(_DEPTHS, Eagle3Params.model_fields["n_predict"].default),
        "hidden_size": d,
        "vocab_size": values.get("vocab_size"),
        "layers": layers,
        "aux_layers": None if ids == known else ids,
        "draft_vocab_size": None if drafted == values.get("vocab_size") else drafted,
        "norm_output": bool(values.get("norm_output", False)),
        "layer": {
            "heads": heads,
            "kv_heads": _whole(values, "num_key_value_heads", heads),
            "head_dim": _whole(values, "head_dim", max(d // heads, 1)),
            "intermediate_size": _whole(values, "intermediate_size"),
            "bias": values.get("attention_bias", False),
            "eps": values.get("rms_norm_eps", 1e-6),
            "rope_theta": _rope_theta(values),
            "positions": _whole(values, "max_position_embeddings", 2048),
        },
    }


def renamed(state: Mapping[str, Tensor], config: SpeculatorConfig) -> dict[str, Tensor]:
    """The tensors under our names; what we have no name for keeps its own, and is refused later.

    Raises:
        CheckpointError: an embedding of its own, or d2t and t2d that contradict each other.
    """
    found = {
        f"midlayer.{name.removeprefix('layers.0.')}" if name.startswith("layers.0.") else name: tensor
        for name, tensor in state.items()
        if not name.endswith("rotary_emb.inv_freq")  # follows from rope_theta
    }
    if "embed_tokens.weight" in found:
        raise CheckpointError("it has an embedding of its own (embed_tokens.weight); eagle3 here reads the base's")
    offsets, chosen = found.pop("d2t", None), found.pop("t2d", None)
    if offsets is None or (config.draft_vocab_size is None and not offsets.any()):
        return found
    token_map = offsets.to(torch.int64) + torch.arange(len(offsets))
    inside = bool(((token_map >= 0) & (token_map < config.vocab_size)).all())
    if chosen is not None and inside and not torch.equal(chosen.bool(), _drafted(token_map, config.vocab_size)):
        raise CheckpointError("d2t and t2d name different tokens")
    return {**found, "token_map": token_map}


def _tapped(config: Eagle3Config) -> list[int]:
    return [tap.layer for tap in config.taps(config.layers) if tap.layer is not None]


def _drafted(token_map: Tensor, vocab_size: int) -> Tensor:
    return torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, token_map, True)


def _whole(values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = values.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{name} is {value!r}, expected a positive integer")
    return value


def _rope_theta(values: Mapping[str, Any]) -> Any:
    """The base of the rotary embedding, which is the plain one here."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
            raise CheckpointError(f"{name} is {rope!r}: eagle3 here has the plain rotary embedding (rope_type default)")
        if "rope_theta" in rope:
            return rope["rope_theta"]
    return values.get("rope_theta", 10000.0)

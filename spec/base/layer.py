"""The base's decoder layers as a draft layer repeats them: their shape, and the weights of the last one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spec.base.taps import layers_of
from spec.heads import Layer

_PROJECTIONS = (*(f"self_attn.{name}" for name in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
_NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}
_LLAMA = {*(f"{name}_proj.weight" for name in _PROJECTIONS), *_NORMS}
_BIASES = {f"self_attn.{name}_proj.bias" for name in "qkvo"}
_QUERY_NORMS = {f"self_attn.{name}_norm.weight" for name in "qk"}


def layer_of(model: Any) -> Layer | None:
    """The shape of a base's layers; what its family does not have is as in Llama, at the base's width. None where its
    config gives no one shape, as of layers that differ."""
    text = model.config.get_text_config()
    d = text.hidden_size
    try:
        heads = getattr(text, "num_attention_heads", None) or max(d // 64, 1)
        rope = getattr(text, "rope_parameters", None)
        theta = rope.get("rope_theta") if isinstance(rope, dict) else None
        width = getattr(text, "intermediate_size", None)
        return Layer(
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or max(d // heads, 1),
            intermediate_size=width if isinstance(width, int) else 4 * d,
            bias=not _BIASES.isdisjoint(_last(model)),
            eps=float(getattr(text, "rms_norm_eps", None) or 1e-5),
            rope_theta=float(theta or 10000.0),
            positions=max(getattr(text, "max_position_embeddings", None) or 2048, 1),
        )
    except Exception:  # configs refuse an ambiguous name with errors of their own
        return None


def last_layer(model: Any) -> dict[str, Tensor]:
    """The weights of a base's last layer under their names in Llama after "layer.", and of its last norm as
    "norm.weight"; nothing where it is no layer of Llama's kind. Queries and keys that are normalised are left out."""
    found = _last(model)
    norm = getattr(model.get_decoder(), "norm", None)
    others = found.keys() - _LLAMA - _BIASES - _QUERY_NORMS
    # Gemma's norms multiply by 1 + weight.
    if others or not found.keys() >= _LLAMA or norm is None or model.config.model_type.startswith("gemma"):
        return {}
    width = model.config.get_text_config().hidden_size
    value = found["self_attn.v_proj.weight"]
    if not value.is_floating_point() or value.ndim != 2 or value.shape[1] != width:  # quantised
        return {}
    if not _QUERY_NORMS.isdisjoint(found):
        found = {name: each for name, each in found.items() if "q_" not in name and "k_" not in name}
    return {f"layer.{name}": each for name, each in found.items()} | {"norm.weight": norm.weight}


def _last(model: Any) -> dict[str, Tensor]:
    layers = layers_of(model)
    return dict(layers[-1].named_parameters()) if layers else {}

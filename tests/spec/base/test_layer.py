"""A base's layers as a draft layer repeats them."""

import pytest

from bench.bases import make
from spec.base import last_layer, layer_of

PROJECTIONS = {f"layer.self_attn.{name}_proj.weight" for name in "qkvo"}
OTHERS = {"layer.mlp.gate_proj.weight", "layer.input_layernorm.weight", "norm.weight"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_layers_of_llamas_kind_are_given_with_their_shape(family: str) -> None:
    model = make(family).model
    found, layer, config = last_layer(model), layer_of(model), model.config
    assert found.keys() >= OTHERS
    assert (found.keys() >= PROJECTIONS) == (family != "qwen3")  # whose queries and keys are normalised
    assert found["norm.weight"] is model.model.norm.weight
    value = found["layer.self_attn.v_proj.weight"]
    assert value is model.model.layers[-1].self_attn.v_proj.weight
    assert value.shape[0] == layer.kv_heads * layer.head_dim
    assert layer.heads == config.num_attention_heads
    assert layer.intermediate_size == config.intermediate_size
    assert layer.rope_theta == config.rope_parameters["rope_theta"]
    assert layer.bias == (family == "qwen2")


def test_layers_that_differ_have_no_shape() -> None:
    """Their config refuses the name with an error of its own."""
    model = make("gemma4_text").model
    assert layer_of(model) is None
    assert not last_layer(model)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt", "mpt", "mamba"])
def test_of_other_layers_a_shape_is_made_up(family: str) -> None:
    model = make(family).model
    layer, d = layer_of(model), model.config.get_text_config().hidden_size
    assert not last_layer(model)
    assert layer.intermediate_size >= d
    assert layer.heads % layer.kv_heads == 0

import torch

from spec.heads import build

from .reference import config, inputs


def test_names_and_shapes() -> None:
    shapes = {name: tuple(t.shape) for name, t in build(config("medusa", num_hidden_layers=2)).state_dict().items()}
    blocks = {f"blocks.{i}.layers.{j}.weight": (12, 12) for i in range(3) for j in range(2)}
    assert shapes == blocks | {"lm_head.weight": (23, 12)}
    untied = build(config("medusa", tie_weights=False)).state_dict()
    heads = {f"lm_heads.{i}.weight" for i in range(3)}
    assert set(untied) == heads | {f"blocks.{i}.layers.0.weight" for i in range(3)}


def test_tokens_are_not_read() -> None:
    c = config("medusa")
    speculator = build(c)
    states, tokens = inputs(c)
    assert torch.equal(speculator(states, tokens), speculator(states, tokens.flip(0)))

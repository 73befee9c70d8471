"""The growing cache next to transformers' own, over everything that decoding does to a cache."""

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from bench.bases import VOCAB, make
from spec import kv_cache
from spec.kv_cache import GrowingLayer, make_cache

model = lru_cache(lambda family: make(family).model)

operations = st.one_of(
    st.tuples(st.just("tokens"), st.integers(1, 4)),
    st.tuples(st.just("crop"), st.integers(0, 4)),
    st.tuples(st.just("rows"), st.integers(0, 2**16)),
)


@settings(max_examples=8)
@given(
    family=st.sampled_from(["gpt2", "qwen2"]),
    rows=st.integers(1, 3),
    prefill=st.sampled_from([1, 5, 60]),
    block=st.sampled_from([1, 3, 256]),
    steps=st.lists(operations, min_size=3, max_size=10),
)
def test_every_step_sees_what_the_plain_cache_sees(
    family: str, rows: int, prefill: int, block: int, steps: list[tuple[str, int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "_BLOCK", block)
        compare(family, rows, prefill, steps)


def compare(family: str, rows: int, prefill: int, steps: list[tuple[str, int]]) -> None:
    config = model(family).config
    ours, theirs = make_cache(config), DynamicCache(config=config)
    assert all(type(layer) is GrowingLayer for layer in ours.layers)
    generator = torch.Generator().manual_seed(prefill)
    length = 0
    for what, amount in [("tokens", prefill), *steps, ("tokens", 1)]:
        if what == "tokens":
            ids = torch.randint(VOCAB, (rows, amount), generator=generator)
            logits = [model(family)(ids, past_key_values=cache).logits for cache in (ours, theirs)]
            torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
            length += amount
        elif what == "crop":
            removed = min(amount, length - 1)
            for cache in (ours, theirs):
                cache.crop(-removed)
            length -= removed
        else:
            keep = torch.tensor([row for row in range(rows) if amount >> row & 1] or [rows - 1])
            for cache in (ours, theirs):
                cache.batch_select_indices(keep)
            rows = len(keep)
        assert ours.get_seq_length() == theirs.get_seq_length() == length
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            torch.testing.assert_close(mine.keys, other.keys, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mine.values, other.values, rtol=1e-5, atol=1e-5)


def test_cropping_and_writing_again() -> None:
    layer = GrowingLayer()
    layer.crop(-1)  # untouched layers take every call
    layer.batch_select_indices(torch.tensor([0]))
    first, second = torch.randn(1, 1, 6, 2), torch.randn(1, 1, 2, 2)
    layer.update(first, first)
    layer.crop(-4)
    keys, _ = layer.update(second, second)
    assert torch.equal(keys, torch.cat([first[:, :, :2], second], 2))
    layer.crop(-100)
    assert layer.get_seq_length() == 0
    assert torch.equal(layer.update(first, first)[0], first)


def test_a_step_writes_its_own_positions_only_and_a_full_buffer_doubles() -> None:
    layer, states = GrowingLayer(), torch.randn(1, 3, 2000, 2)
    places = {layer.update(s, -s)[0].data_ptr() for s in states.split(1, 2)}
    assert len(places) <= 5
    assert torch.equal(layer.keys, states)
    assert torch.equal(layer.values, -states)


def test_layers_of_special_kinds_stay_as_they_are() -> None:
    config = model("mistral").config
    kinds = [type(layer) for layer in make_cache(config).layers]
    assert kinds == [type(layer) for layer in DynamicCache(config=config).layers]
    assert DynamicLayer not in kinds

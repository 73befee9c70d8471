"""What a head reads of a base: every layer's input and the last state, in one forward or while it decodes."""

import threading

import pytest
import torch
from torch import nn

from bench.bases import make
from spec.base import Base, BaseError, Tapped, read_taps
from spec.heads import LAST, Tap
from spec.kv_cache import Memory

IDS = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
TAPS = (Tap(0, "all"), Tap(1), LAST)
FAMILIES = ["gpt2", "qwen2", "gemma2", "mpt", "opt", "gpt_neox", "falcon_h1"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_taps_are_the_hidden_states_of_transformers(family: str) -> None:
    base = make(family)
    expected = base.model(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
    found = read_taps(base.model, IDS, TAPS)
    for tap, states in zip(TAPS, (expected[0], expected[1], expected[-1]), strict=True):
        assert torch.equal(found[tap], states)
    assert read_taps(base.model, IDS, TAPS[:1]).keys() == {TAPS[0]}


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@torch.no_grad()
def test_the_newest_vectors_are_kept_while_a_base_decodes(bases: dict[str, Base], family: str) -> None:
    model = bases[family].model
    whole, memory = read_taps(model, IDS, TAPS), Memory(model)
    with Tapped(model, TAPS) as tapped:
        for part in (slice(0, 9), slice(9, 10), slice(10, 20)):
            memory.forward(IDS[:, part])
            for tap in TAPS:
                torch.testing.assert_close(tapped.states[tap], whole[tap][:, part], rtol=1e-4, atol=1e-4)
        kept = tapped.states[LAST]
        other = threading.Thread(target=model, args=(IDS,))
        other.start()
        other.join()
        assert tapped.states[LAST] is kept  # each thread has its own
    model(IDS)
    assert tapped.states[LAST] is kept  # the hooks have gone


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there_is_named(base: Base, layer: int) -> None:
    with pytest.raises(BaseError, match=rf"GPT2LMHeadModel has the layers 0 to 1; there is no layer {layer}"):
        read_taps(base.model, IDS, (Tap(layer),))


def test_a_base_whose_layers_cannot_be_tapped_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BaseError, match=r"layer 0 .* reads \[2, 20, 4, 32\], expected one vector for each token"):
        read_taps(make("deepseek_v4").model, IDS, TAPS)
    other = make("qwen2").model
    monkeypatch.setattr(other.get_decoder(), "layers", nn.Sequential(*other.get_decoder().layers))
    with pytest.raises(BaseError, match="has no list of its layers"):
        read_taps(other, IDS, TAPS)

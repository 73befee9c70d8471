"""The attention head on the device, compared with float64 on the CPU."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spec.heads import LAST, Packed, Speculator, eagle3
from tests.spec.training.runs import D, N, V, make_speculator

LAYER = {"heads": 4, "kv_heads": 2, "head_dim": 6, "intermediate_size": 16}
LENGTHS = (60, 9, 33)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}


@pytest.fixture(params=[None, 12], ids=["whole vocabulary", "draft vocabulary"])
def exact(request: pytest.FixtureRequest) -> Speculator:
    """In float64 on the CPU."""
    return make_speculator("eagle3", layers=8, layer=LAYER, draft_vocab_size=request.param).double()


def sequences(head: Speculator) -> Packed:
    """Their second halves are supervised."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.cat([torch.arange(length) >= length // 2 for length in LENGTHS])
    packed = Packed.of(torch.randint(V, mask.shape, generator=generator), mask, LENGTHS, {})
    counts = {tap: len(packed.starts if tap == LAST else mask) for tap in head.taps}
    return replace(packed, states={tap: torch.randn(count, D, generator=generator) for tap, count in counts.items()})


def by_training(head: Speculator, packed: Packed) -> list[Tensor]:
    """The vectors of every depth, and the gradients of what follows from them."""
    vectors = head.unroll(packed, [torch.arange(len(packed.starts), device=packed.ids.device)] * N)
    own = [parameter for name, parameter in head.named_parameters() if name not in {*head.borrowed, "lm_head.weight"}]
    return [*vectors, *torch.autograd.grad(torch.cat(vectors).sin().sum(), own)]


@pytest.mark.parametrize("chunk", [eagle3.SCORES, 500], ids=["whole", "in parts"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_training(
    exact: Speculator, dtype: torch.dtype, chunk: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = sequences(exact)
    expected = by_training(exact, packed)
    monkeypatch.setattr(eagle3, "SCORES", chunk)
    found = by_training(copy.deepcopy(exact).to(device, dtype), packed.to(device))
    for ours, theirs in zip(found, expected, strict=True):
        difference = (ours.cpu().double() - theirs).norm() / theirs.norm()
        assert difference < TOLERANCE[dtype], difference


def test_drafts(exact: Speculator, device: torch.device) -> None:
    packed = sequences(exact)
    rows = torch.arange(len(packed.starts))
    found = copy.deepcopy(exact).to(device).draft_along(packed.to(device), rows.to(device), 2 * N)
    assert torch.equal(found.cpu(), exact.draft_along(packed, rows, 2 * N))

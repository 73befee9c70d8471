"""Heads on the device, compared with float64 on the CPU."""

import copy
from typing import Any

import pytest
import torch

from spec.heads import Speculator
from tests.spec.training.runs import D, N, V, make_speculator

POSITIONS = 200
SHAPES: dict[str, dict[str, Any]] = {
    "sum_rnn": {"method": "sum_rnn"},
    "sum_rnn, untied": {"method": "sum_rnn", "tie_weights": False},
    "sum_rnn, stacks": {"method": "sum_rnn", "inner_dim": (16, 24), "emb_dim": (16, 24), "proj_dim": (16, 24)},
    "sum_rnn, draft vocabulary": {"method": "sum_rnn", "draft_vocab_size": 12},
    "sum_lstm": {"method": "sum_lstm"},
    "sum_lstm, one embedding": {"method": "sum_lstm", "tie_lstm_embs": True},
}


@pytest.fixture(params=SHAPES)
def exact(request: pytest.FixtureRequest) -> Speculator:
    """In float64 on the CPU."""
    return make_speculator(**SHAPES[request.param]).double()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(POSITIONS, D, generator=generator, dtype=torch.float64)
    return states, torch.randint(V, (POSITIONS, N), generator=generator)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_logits(exact: Speculator, dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    states, tokens = inputs()
    ours = copy.deepcopy(exact).to(device, dtype)
    found = ours(states.to(device), tokens.to(device)).cpu().double()
    torch.testing.assert_close(found, exact(states, tokens), rtol=tolerance, atol=tolerance)


def test_drafts(exact: Speculator, device: torch.device) -> None:
    states, tokens = inputs()
    expected = exact.draft(states, tokens[:, 0])
    ours = copy.deepcopy(exact).to(device)
    assert torch.equal(ours.draft(states.to(device), tokens[:, 0].to(device)).cpu(), expected)

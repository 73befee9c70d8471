"""The fused loss beside plain cross-entropy, value and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from spec.heads import Speculator, SpeculatorConfig, build, init_random
from spec.store.reader import Positions
from spec.training import loss as loss_module
from spec.training.loss import SpeculatorLoss, linear_cross_entropy

V, D, P = 19, 8, 23


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one not full."""
    monkeypatch.setattr(loss_module, "CHUNK", 5)


def inputs(rows: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (rows,), generator=generator)
    return hidden, weight, targets, torch.rand(rows, generator=generator, dtype=dtype)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 17), seed=st.integers(0, 99), factor=st.sampled_from([1.0, -3.5]))
def test_the_fused_loss_is_cross_entropy(rows: int, seed: int, factor: float) -> None:
    hidden, weight, targets, scale = inputs(rows, seed)
    logits = hidden @ weight.T
    plain = F.cross_entropy(logits, targets, reduction="none")
    expected = torch.autograd.grad((plain * scale).sum() * factor, (hidden, weight))
    total, losses, correct = linear_cross_entropy(hidden, weight, targets, scale)
    (total * factor).backward()
    torch.testing.assert_close(total, (plain * scale).sum())
    torch.testing.assert_close(losses, plain)
    assert torch.equal(correct, logits.argmax(1) == targets)
    torch.testing.assert_close((hidden.grad, weight.grad), expected)
    assert not losses.requires_grad


def test_gradients_reach_the_table_that_two_calls_share() -> None:
    hidden, weight, targets, scale = inputs(12)
    (linear_cross_entropy(hidden, weight, targets, scale)[0] * 2).backward()
    linear_cross_entropy(hidden.detach(), weight, targets, scale)[0].backward()
    plain = (F.cross_entropy(hidden @ weight.T, targets, reduction="none") * scale).sum()
    torch.testing.assert_close(weight.grad, torch.autograd.grad(plain, weight)[0] * 3)


def test_logits_of_any_size_give_finite_losses() -> None:
    hidden, weight, targets, scale = inputs(9, dtype=torch.float32)
    total, losses, _ = linear_cross_entropy(hidden * 1e4, weight, targets, scale)
    total.backward()
    assert losses.isfinite().all()
    assert (losses >= 0).all()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    torch.testing.assert_close(losses, F.cross_entropy(hidden * 1e4 @ weight.T, targets, reduction="none"))


def test_without_gradients_nothing_is_kept_for_them() -> None:
    hidden, weight, targets, scale = inputs(9)
    with torch.no_grad():
        total, losses, _ = linear_cross_entropy(hidden, weight, targets, scale)
    assert not total.requires_grad
    torch.testing.assert_close(losses, F.cross_entropy(hidden @ weight.T, targets, reduction="none").detach())


def test_mixed_precision_rounds_as_a_linear_would() -> None:
    hidden, weight, targets, scale = inputs(64, dtype=torch.float32)
    exact = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, scale)[0], (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, losses, _ = linear_cross_entropy(hidden, weight, targets, scale)
        logits = F.linear(hidden, weight)
    rounded = torch.autograd.grad(total, (hidden, weight))
    assert losses.dtype == torch.float32
    assert [grad.dtype for grad in rounded] == [torch.float32, torch.float32]
    torch.testing.assert_close(losses, F.cross_entropy(logits.float(), targets, reduction="none"), rtol=1e-2, atol=2e-2)
    for found, expected in zip(rounded, exact, strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()


CASES: list[tuple[str, dict[str, Any]]] = [
    ("sum_rnn", {"tie_weights": True}),
    ("sum_rnn", {"tie_weights": False}),
    ("sum_rnn", {"inner_dim": (6, 10), "emb_dim": (4, 6), "proj_dim": (6,), "scale_input": True}),
    ("sum_lstm", {"tie_lstm_embs": False}),
    ("sum_lstm", {"tie_lstm_embs": True}),
    ("medusa", {"tie_weights": False}),
    ("medusa", {"tie_weights": True}),
]


def make(method: Any, changed: dict[str, Any], drafted: int | None) -> Speculator:
    shape: dict[str, Any] = {"inner_dim": (6,), "emb_dim": (6,), "proj_dim": (6,)}
    config = SpeculatorConfig(
        method=method,
        hidden_size=D,
        vocab_size=V,
        n_predict=3,
        draft_vocab_size=drafted,
        base_model_name_or_path="",
        base_digest="",
        **(shape | changed),
    )
    speculator = build(config, None if drafted is None else torch.arange(V)[-drafted:])
    if method == "medusa":
        generator = torch.Generator().manual_seed(0)
        for parameter in speculator.parameters():
            parameter.data.normal_(0, 0.3, generator=generator)
    else:
        init_random(speculator)
    return speculator.double()


def make_batch(seed: int = 0, rows: int = P) -> Positions:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(rows, 3, generator=generator) < 0.8
    return Positions(
        torch.randn(rows, D, generator=generator, dtype=torch.float64),
        torch.randint(V, (rows, 4), generator=generator),
        valid.cumprod(1).bool(),
    )


def reference(speculator: Speculator, batch: Positions, counts: Tensor) -> tuple[Tensor, list[list[float]]]:
    """The mean over heads of each head's mean, from all logits; and each head's sums of loss and hits."""
    total = torch.zeros((), dtype=torch.float64)
    sums = []
    for i, logits in enumerate(speculator(batch.states, batch.tokens[:, :3])):
        targets = speculator.targets(batch.tokens[:, i + 1])
        rows = batch.valid[:, i] & (targets >= 0)
        losses = F.cross_entropy(logits[rows], targets[rows], reduction="sum")
        total = total + losses / counts[i].double() / 3
        sums.append([losses.item(), float((logits[rows].argmax(1) == targets[rows]).sum())])
    return total, sums


@pytest.mark.parametrize("drafted", [None, 11])
@pytest.mark.parametrize(("method", "changed"), CASES)
def test_the_loss_of_all_heads(method: str, changed: dict[str, Any], drafted: int | None) -> None:
    speculator, batch = make(method, changed, drafted), make_batch()
    counts = batch.valid.sum(0) + 4  # other micro-batches have positions too
    expected, sums = reference(speculator, batch, counts)
    parameters = [p for p in speculator.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, parameters)
    total, found = SpeculatorLoss(speculator)(batch, counts)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, torch.tensor(sums, dtype=torch.float64), rtol=1e-9, atol=0)
    for grad, other in zip(torch.autograd.grad(total, parameters), wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-6, atol=1e-7)  # the scale is float32
    assert found[:, 1].sum() > 0
    assert not found.requires_grad


def test_parts_of_a_batch_add_up_to_it() -> None:
    speculator, batch = make("sum_rnn", {}, 11), make_batch()
    counts = batch.valid.sum(0)
    whole, sums = SpeculatorLoss(speculator)(batch, counts)
    cuts = [slice(0, 7), slice(7, 7), slice(7, P)]
    parts = [Positions(batch.states[cut], batch.tokens[cut], batch.valid[cut]) for cut in cuts]
    results = [SpeculatorLoss(speculator)(part, counts) for part in parts]
    torch.testing.assert_close(torch.stack([total for total, _ in results]).sum(), whole)
    torch.testing.assert_close(torch.stack([part for _, part in results]).sum(0), sums)


@pytest.mark.parametrize(("method", "changed"), CASES)
def test_a_batch_without_supervised_tokens_moves_nothing(method: str, changed: dict[str, Any]) -> None:
    """And every parameter still gets a gradient, which data-parallel training waits for."""
    speculator, batch = make(method, changed, None), make_batch()
    empty = Positions(batch.states, batch.tokens, torch.zeros_like(batch.valid))
    for nothing in (empty, Positions(batch.states[:0], batch.tokens[:0], batch.valid[:0])):
        total, sums = SpeculatorLoss(speculator)(nothing, torch.zeros(3, dtype=torch.long))
        speculator.zero_grad()
        total.backward()
        assert total.item() == 0
        assert not sums.any()
        for parameter in speculator.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()

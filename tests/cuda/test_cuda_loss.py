"""The chunked loss and its gradients on the device, compared with plain formulas in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spec.base import Teacher
from spec.training import loss as loss_module
from spec.training.loss import linear_cross_entropy

V, D, ROWS, HEADS = 4099, 96, 70, 3
FACTOR = 2.5
CPU = torch.device("cpu")


def problem(device: torch.device, dtype: torch.dtype, soft: bool) -> tuple[Tensor, ...]:
    """hidden [M, D], weight [V, D], targets [M], scale [M] and, with `soft`, the teacher's states and table."""
    generator = torch.Generator().manual_seed(0)
    M = ROWS * HEADS
    hidden = torch.randn(M, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64) / 4
    targets = torch.randint(V, (M,), generator=generator)
    scale = torch.rand(M, generator=generator, dtype=torch.float64)
    states = torch.randn(ROWS, D, generator=generator, dtype=torch.float64)
    table = torch.randn(V, D, generator=generator, dtype=torch.float64) / 4
    parts = (hidden, weight, targets, scale, *((states, table) if soft else ()))
    return tuple(part.to(device, dtype if part.is_floating_point() else part.dtype) for part in parts)


def by_formula(hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, *teacher: Tensor) -> list[Tensor]:
    """Sum, each row's loss, and the gradients."""
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    logits = hidden @ weight.T
    if teacher:
        states, table = teacher
        wanted = (states @ table.T).log_softmax(1).repeat(HEADS, 1)
        losses = F.kl_div(logits.log_softmax(1), wanted, reduction="none", log_target=True).sum(1)
    else:
        losses = F.cross_entropy(logits, targets, reduction="none")
    total = (losses * scale).sum()
    return [total.detach(), losses.detach(), *torch.autograd.grad(total * FACTOR, (hidden, weight))]


def by_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, *teacher: Tensor, mixed: bool = False
) -> list[Tensor]:
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=mixed):
        taught = (teacher[0], Teacher(teacher[1])) if teacher else None
        total, losses, _ = linear_cross_entropy(hidden, weight, targets, scale, taught)
    return [total.detach(), losses, *torch.autograd.grad(total * FACTOR, (hidden, weight))]


@pytest.mark.parametrize("soft", [False, True], ids=["ce", "kl"])
@pytest.mark.parametrize("chunk_rows", [11, 10_000], ids=["several chunks", "one chunk"])
def test_float32_is_as_exact_as_float32_can_be(
    soft: bool, chunk_rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss_module.CHUNK_LOGITS, device.type, chunk_rows * V)
    expected = by_formula(*problem(CPU, torch.float64, soft))
    found = by_chunks(*problem(device, torch.float32, soft))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("soft", [False, True], ids=["ce", "kl"])
def test_bfloat16_rounds_and_no_more(soft: bool, device: torch.device) -> None:
    expected = by_formula(*problem(CPU, torch.float64, soft))
    found = by_chunks(*problem(device, torch.float32, soft), mixed=True)
    for ours, theirs in zip(found, expected, strict=True):
        difference = (ours.cpu().double() - theirs).norm() / theirs.norm()
        assert difference < 0.02, difference
        assert ours.dtype == torch.float32


def test_hits_are_the_rows_whose_target_has_the_highest_logit(device: torch.device) -> None:
    hidden, weight, targets, scale = problem(device, torch.float32, soft=False)
    best = (hidden @ weight.T).argmax(1)
    targets = torch.where(torch.arange(len(targets), device=device) % 2 == 0, best, targets)
    _, _, correct = linear_cross_entropy(hidden, weight, targets, scale)
    assert torch.equal(correct, targets == best)

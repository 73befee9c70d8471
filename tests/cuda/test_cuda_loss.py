"""The chunked loss and its gradients on the device, compared with plain formulas in float64 on the CPU."""

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
    targets = torch.where(torch.arange(M) % 2 == 0, (hidden @ weight.T).argmax(1), targets)  # every second is a hit
    scale = torch.rand(M, generator=generator, dtype=torch.float64)
    states = torch.randn(ROWS, D, generator=generator, dtype=torch.float64)
    table = torch.randn(V, D, generator=generator, dtype=torch.float64) / 4
    parts = (hidden, weight, targets, scale, *((states, table) if soft else ()))
    return tuple(part.to(device, dtype if part.is_floating_point() else part.dtype) for part in parts)


def by_formula(hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, *teacher: Tensor) -> list[Tensor]:
    """Sum, each row's loss, the gradients, and which rows are hits."""
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    logits = hidden @ weight.T
    if teacher:
        states, table = teacher
        wanted = (states @ table.T).log_softmax(1).repeat(HEADS, 1)
        losses = F.kl_div(logits.log_softmax(1), wanted, reduction="none", log_target=True).sum(1)
    else:
        losses = F.cross_entropy(logits, targets, reduction="none")
    total = (losses * scale).sum()
    correct = (logits.argmax(1) == targets).double()
    return [total.detach(), losses.detach(), *torch.autograd.grad(total * FACTOR, (hidden, weight)), correct]


def by_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, *teacher: Tensor, mixed: bool = False
) -> list[Tensor]:
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=mixed):
        taught = (teacher[0], Teacher(teacher[1])) if teacher else None
        total, losses, correct = linear_cross_entropy(hidden, weight, targets, scale, taught)
    return [total.detach(), losses, *torch.autograd.grad(total * FACTOR, (hidden, weight)), correct.float()]


@pytest.mark.parametrize("soft", [False, True], ids=["ce", "kl"])
@pytest.mark.parametrize("rows", [11, 10_000], ids=["several chunks", "one chunk"])
def test_float32_only_rounds(soft: bool, rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.CHUNK_LOGITS, device.type, rows * V)
    expected = by_formula(*problem(CPU, torch.float64, soft))
    found = by_chunks(*problem(device, torch.float32, soft))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("soft", [False, True], ids=["ce", "kl"])
def test_bfloat16_only_rounds(soft: bool, device: torch.device) -> None:
    expected = by_formula(*problem(CPU, torch.float64, soft))
    found = by_chunks(*problem(device, torch.float32, soft), mixed=True)
    for ours, theirs in zip(found[:-1], expected[:-1], strict=True):  # rounding decides who is first
        difference = (ours.cpu().double() - theirs).norm() / theirs.norm()
        assert difference < 0.02, difference
        assert ours.dtype == torch.float32

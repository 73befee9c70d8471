"""Head and cross-entropy in one, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spec.heads import Speculator
from spec.store.reader import Positions

CHUNK = 1024
"""Rows whose logits [rows, V] exist at one time."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies of ``hidden @ weight.T``, with gradients computed chunk by chunk on the way.

    The idea is that of Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024): the loss is a scalar, so its
    gradients can be made in the forward pass, while a chunk's logits are at hand, and scaled in the backward one.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor, needed: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = hidden.device.type
        low_weight = weight.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype)
        losses = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needed else None
        grad_weight = torch.zeros_like(weight) if needed else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), CHUNK):
                rows = slice(start, start + CHUNK)
                inputs, target = hidden[rows].to(low_weight.dtype), targets[rows, None]
                logits = (inputs @ low_weight.T).to(losses.dtype)  # [C, V]
                at_target = logits.gather(1, target)
                top = logits.amax(1, keepdim=True)
                correct[rows] = (at_target >= top)[:, 0]
                probabilities = logits.sub_(top).exp_()
                total = probabilities.sum(1, keepdim=True)
                losses[rows] = (total.log() + top - at_target)[:, 0]
                if grad_hidden is not None and grad_weight is not None:
                    factor = scale[rows, None]
                    grad = probabilities.mul_(factor / total)
                    grad.scatter_add_(1, target, -factor.to(grad.dtype))
                    low_grad = grad.to(low_weight.dtype)
                    grad_hidden[rows] = (low_grad @ low_weight).to(hidden.dtype)
                    grad_weight += low_grad.T @ inputs
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses, correct)
        return (losses * scale).sum(), losses, correct

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight.mul_(grad), None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of a linear head.

    Args:
        hidden: [M, h].
        weight: [V, h].
        targets: [M], rows of weight.
        scale: [M], the factor of each row in the sum.

    Returns:
        The scalar sum of scale * loss, which has gradients; each row's loss [M]; and whether its target has the
        highest logit [M].
    """
    needed = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, weight, targets, scale, needed)  # type: ignore[no-any-return, no-untyped-call]


class SpeculatorLoss(nn.Module):
    """Teacher-forced cross-entropy of every head: the mean over heads of each head's mean over its positions.

    A module, so that DistributedDataParallel can wrap it.
    """

    def __init__(self, speculator: Speculator) -> None:
        super().__init__()
        self.speculator = speculator

    def forward(self, batch: Positions, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's part of the loss.

        Args:
            batch: positions of this micro-batch.
            counts: [n] supervised positions of each head in the whole batch, over all workers and micro-batches.

        Returns:
            The loss's part (a scalar with gradients), and [n, 2] sums without gradients: loss, hits. A target
            outside the draft vocabulary trains nothing and counts as a miss.
        """
        speculator = self.speculator
        n = speculator.config.n_predict
        carry = speculator.start(batch.states)
        hidden, targets, scale, head = [], [], [], []
        for i in range(n):
            carry, state = speculator.step(i, carry, batch.tokens[:, i])
            index = speculator.targets(batch.tokens[:, i + 1])
            rows = (batch.valid[:, i] & (index >= 0)).nonzero()[:, 0]
            hidden.append(state[rows])
            targets.append(index[rows])
            scale.append((1.0 / (n * counts[i].clamp(min=1))).expand(len(rows)))
            head.append(torch.full((len(rows),), i, device=rows.device))
        total, losses, correct = self._sum(hidden, targets, scale)
        sums = torch.zeros(n, 2, device=losses.device, dtype=losses.dtype)
        sums.index_add_(0, torch.cat(head), torch.stack([losses, correct.to(losses.dtype)], 1))
        return total, sums

    def _sum(
        self, hidden: list[torch.Tensor], targets: list[torch.Tensor], scale: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One call for all heads that share their weight, else one a head."""
        weights = [self.speculator.head(i).weight for i in range(len(hidden))]
        if all(weight is weights[0] for weight in weights):
            return linear_cross_entropy(torch.cat(hidden), weights[0], torch.cat(targets), torch.cat(scale))
        parts = [linear_cross_entropy(*part) for part in zip(hidden, weights, targets, scale, strict=True)]
        total = torch.stack([part[0] for part in parts]).sum()
        return total, torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])

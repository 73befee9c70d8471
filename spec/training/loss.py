"""Head and loss in one, with a bounded number of logits at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spec.base import Teacher
from spec.heads import LAST, Packed, Speculator, Supervision, supervise

CHUNK_LOGITS = {"cpu": 2**24, "mps": 2**24, "cuda": 2**28}
"""The most logits [rows, V] that exist at one time, by device. A chunk reads the weight and adds to its gradient once;
a GPU computes products so fast that only more rows make up for that (by arithmetic; not measured)."""

Soft = tuple[Tensor, Tensor]
"""A teacher's distribution for C rows, [C, V], and its entropy [C]."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Weighted sum of losses of ``hidden @ weight.T``, with gradients computed chunk by chunk on the way.

    As in Liger-Kernel (Hsu et al. 2024), the loss is a scalar, so its gradients are made in the forward pass, while a
    chunk's logits are at hand, and scaled in the backward one. There are G groups of rows, one
    for each head, with the same teacher rows; a chunk takes the same C rows of every group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor,
        taught: tuple[Tensor, Teacher] | None,
        needed: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = len(hidden) // len(taught[0]) if taught is not None and len(taught[0]) else 1
        length = len(hidden) // groups
        hidden = hidden.view(groups, length, hidden.shape[1])
        targets, scale = targets.view(groups, length), scale.view(groups, length)
        room = _Room(hidden, weight, None if taught is None else taught[1])
        losses = torch.empty(targets.shape, dtype=room.logits.dtype, device=hidden.device)
        correct = torch.empty(targets.shape, dtype=torch.bool, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needed else None
        learns = needed and weight.requires_grad  # not where the base's own lm_head is borrowed
        grad_weight = torch.zeros_like(weight) if learns else None
        part = torch.empty_like(room.weight) if learns else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, length, room.rows):
                rows = slice(start, start + room.rows)
                inputs = hidden[:, rows].to(room.weight.dtype).flatten(0, 1)  # [G * C, h]
                target, factor = (tensor[:, rows].reshape(-1, 1) for tensor in (targets, scale))
                soft = None if taught is None else room.distribution(taught[0][rows])
                logits, likeliest = room.shifted_logits(inputs)  # [G * C, V]
                loss, total = _loss(logits, target, soft)
                losses[:, rows] = loss.view(groups, -1)
                correct[:, rows] = (likeliest[:, None] == target).view(groups, -1)
                if grad_hidden is None:
                    continue
                _gradient(logits, total, target, factor, soft)
                grad = room.low[: len(inputs)].copy_(logits)
                grad_hidden[:, rows] = (grad @ room.weight).to(hidden.dtype).view(groups, -1, hidden.shape[-1])
                if grad_weight is not None:
                    grad_weight += torch.mm(grad.T, inputs, out=part)
        total, losses, correct = (losses * scale).sum(), losses.flatten(), correct.flatten()
        ctx.save_for_backward(None if grad_hidden is None else grad_hidden.flatten(0, 1), grad_weight)
        ctx.mark_non_differentiable(losses, correct)
        return total, losses, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        learned = None if grad_weight is None else grad_weight.mul_(grad)
        return grad_hidden * grad.to(grad_hidden.dtype), learned, None, None, None, None


class _Room:
    """Memory that every chunk uses again: fresh pages for each would cost a fifth of the time on a CPU."""

    def __init__(self, hidden: Tensor, weight: Tensor, teacher: Teacher | None) -> None:
        """For the rows [G, R, h] of a call, weight [V, h]."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wide = torch.promote_types(hidden.dtype, torch.float32)
        groups, length, _ = hidden.shape
        V = len(weight)
        self.rows = max(min(CHUNK_LOGITS[device] // (V * groups), length), 1)  # C, of a chunk in each group
        self.weight = weight.to(dtype)  # of the products
        self.logits = torch.empty(groups * self.rows, V, dtype=wide, device=hidden.device)
        # The same in the dtype of the products; the same memory where the dtypes agree.
        self.low = self.logits if dtype == wide else torch.empty_like(self.logits, dtype=dtype)
        if teacher is not None:
            self.teacher, self.table = teacher, teacher.lm_head.to(dtype)
            self.soft = torch.empty(self.rows, V, dtype=wide, device=hidden.device)

    def shifted_logits(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' logits minus their largest, [G * C, V], and its index: the token that would be drafted."""
        low, logits = self.low[: len(inputs)], self.logits[: len(inputs)]
        logits.copy_(torch.mm(inputs, self.weight.T, out=low))
        largest, likeliest = logits.max(1)  # the first of equal ones
        return logits.sub_(largest[:, None]), likeliest  # sums round less for the shift

    def distribution(self, states: Tensor) -> Soft:
        """The base's own distribution after these states [C, d]; overwrites the logits."""
        low, logits, probabilities = (room[: len(states)] for room in (self.low, self.logits, self.soft))
        logits.copy_(torch.mm(states.to(low.dtype), self.table.T, out=low))
        self.teacher.finish(logits)
        logits.sub_(logits.amax(1, keepdim=True))
        torch.exp(logits, out=probabilities)
        total = probabilities.sum(1)
        probabilities.div_(total[:, None])
        return probabilities, total.log() - _dots(probabilities, logits[None])[0]


def _loss(logits: Tensor, target: Tensor, soft: Soft | None) -> tuple[Tensor, Tensor]:
    """Each row's loss, and the sum of its exponentials, [G * C, 1] both; turns the logits into exponentials.

    Cross-entropy is log sum exp(logits) - logits[target]. The divergence from a teacher p is
    log sum exp(logits) - (sum p logits + entropy(p)).
    """
    if soft is None:
        expected = logits.gather(1, target.clamp(min=0))
    else:
        probabilities, entropy = soft
        expected = (_dots(probabilities, logits.view(-1, *probabilities.shape)) + entropy).reshape(-1, 1)
    total = logits.exp_().sum(1, keepdim=True)
    return total.log() - expected, total


def _gradient(exponentials: Tensor, total: Tensor, target: Tensor, factor: Tensor, soft: Soft | None) -> None:
    """Turn exponentials [G * C, V] into the gradient of the logits: factor * (softmax - target's distribution)."""
    grad = exponentials.mul_(factor / total)
    if soft is None:
        grad.scatter_add_(1, target, -factor.to(grad.dtype))
    else:
        by_group = grad.view(-1, *soft[0].shape)  # [G, C, V]
        by_group.addcmul_(soft[0], factor.view(len(by_group), -1, 1).to(grad.dtype), value=-1)


def _dots(rows: Tensor, groups: Tensor) -> Tensor:
    """Each row's dot product with the same row of each group: [C, V], [G, C, V] -> [G, C], without writing products."""
    return torch.bmm(rows[:, None], groups.permute(1, 2, 0))[:, 0].T


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    taught: tuple[Tensor, Teacher] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of a linear head, or its divergence from a teacher.

    Args:
        hidden: [M, h].
        weight: [V, h].
        targets: [M], rows of weight; where taught, -1 if the written token has none.
        scale: [M], the factor of each row in the sum.
        taught: the base's states [R, d] from which it wrote the targets, and what makes its distributions over the V
            rows of weight. The loss is then KL(base || head). Every R of the M rows have the same R states, whose
            distributions are computed once for all of them.

    Returns:
        The scalar sum of scale * loss, which has gradients; each row's loss [M]; and whether its target is the token
        that would be drafted [M]: that of the highest logit, the first of equal ones.
    """
    needed = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, weight, targets, scale, taught, needed)  # type: ignore[no-any-return, no-untyped-call]


class SpeculatorLoss(nn.Module):
    """Teacher-forced loss of every depth: the mean over depths of each depth's mean over its drafts.

    A module, so that DistributedDataParallel can wrap it. head_weights are those of each depth's loss, scaled to a mean
    of 1. The teacher has the base's own distributions, over the draft vocabulary if there is one; without a teacher the
    loss is cross-entropy on the written tokens.
    """

    head_weights: Tensor

    def __init__(
        self, speculator: Speculator, head_weights: Sequence[float] | None = None, teacher: Teacher | None = None
    ) -> None:
        super().__init__()
        self.speculator, self.teacher = speculator, teacher
        device = next(speculator.parameters()).device
        weights = torch.tensor(head_weights or [1.0] * speculator.config.n_predict, device=device)
        self.register_buffer("head_weights", weights / weights.mean(), persistent=False)
        index = speculator.draft_index
        self._draft_index = None if index is None else index.cpu()  # supervise works on the CPU

    def supervise(self, packed: Packed) -> Supervision:
        """The sequences, on the CPU, with the targets of their drafts."""
        n = self.speculator.config.n_predict
        return supervise(packed, n, self._draft_index, taught=self.teacher is not None)

    def forward(self, batch: Supervision, counts: Tensor) -> tuple[Tensor, Tensor]:
        """A micro-batch's part of the loss (a scalar with gradients), and [n, 2] sums without gradients: loss, hits.

        `counts` [n] are the supervised drafts of each depth in the whole batch, over all workers and micro-batches. A
        target outside the draft vocabulary counts as a miss; by cross-entropy it trains nothing.
        """
        sizes = batch.sizes
        vectors = self.speculator.unroll(batch.packed, torch.split(batch.rows, sizes))
        outputs = [self.speculator.output(k) for k in range(len(sizes))]
        scale = F.pad(self.head_weights / (len(sizes) * counts.clamp(min=1)), (0, 1)).index_select(0, batch.depths)
        soft = None
        if self.teacher is not None:
            soft = batch.packed.states[LAST].detach().index_select(0, batch.taught), self.teacher
        if all(output is outputs[0] for output in outputs):
            total, losses, correct = linear_cross_entropy(torch.cat(vectors), outputs[0], batch.targets, scale, soft)
        else:
            split = torch.split(batch.targets, sizes), torch.split(scale, sizes)
            parts = [linear_cross_entropy(*part, soft) for part in zip(vectors, outputs, *split, strict=True)]
            total = torch.stack([part[0] for part in parts]).sum()
            losses, correct = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
        sums = torch.zeros(len(sizes) + 1, 2, device=losses.device, dtype=losses.dtype)
        sums.index_add_(0, batch.depths, torch.stack([losses, correct.to(losses.dtype)], 1))
        return total, sums[:-1]

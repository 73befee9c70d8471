"""Head and loss in one, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spec.heads import Speculator
from spec.store.reader import Positions

CHUNK_LOGITS = 2**24
"""Logits [rows, V] that exist at one time."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Weighted sum of losses of ``hidden @ weight.T``, with gradients computed chunk by chunk on the way.

    The idea is that of Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024): the loss is a scalar, so its
    gradients can be made in the forward pass, while a chunk's logits are at hand, and scaled in the backward one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor,
        teacher: tuple[Tensor, Tensor] | None,
        needed: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device.type
        low_weight = weight.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype)
        losses = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needed else None
        grad_weight = torch.zeros_like(weight) if needed else None
        chunk = max(min(CHUNK_LOGITS // len(weight), len(hidden)), 1)
        # Memory that every chunk uses again: fresh pages for each would cost a fifth of the time on a CPU.
        room = [losses.new_empty(chunk, len(weight)) for _ in range(1 if teacher is None else 2)]
        low_room = room[0] if low_weight.dtype == losses.dtype else low_weight.new_empty(chunk, len(weight))
        part = torch.empty_like(low_weight) if needed else None
        taught, table = (None, None) if teacher is None else (teacher[0], teacher[1].to(low_weight.dtype))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                inputs, target = hidden[rows].to(low_weight.dtype), targets[rows, None]
                low, *held = (buffer[: len(inputs)] for buffer in (low_room, *room))  # each [C, V]
                soft = entropy = None
                if taught is not None and table is not None:
                    soft, entropy = _distribution(taught[rows], table, low, held)
                logits = held[0].copy_(torch.mm(inputs, low_weight.T, out=low))
                at_target = logits.gather(1, target.clamp(min=0))
                top = logits.amax(1, keepdim=True)
                correct[rows] = ((at_target >= top) & (target >= 0))[:, 0]
                expected = at_target
                if soft is not None:  # KL(p || q) = -entropy(p) - sum p log q
                    expected = torch.linalg.vecdot(soft, logits)[:, None] + entropy
                probabilities = logits.sub_(top).exp_()
                total = probabilities.sum(1, keepdim=True)
                losses[rows] = (total.log() + top - expected)[:, 0]
                if grad_hidden is not None and grad_weight is not None and part is not None:
                    factor = scale[rows, None]
                    grad = probabilities.mul_(factor / total)
                    if soft is None:
                        grad.scatter_add_(1, target, -factor.to(grad.dtype))
                    else:
                        grad.sub_(soft.mul_(factor))
                    low_grad = low.copy_(grad)
                    grad_hidden[rows] = (low_grad @ low_weight).to(hidden.dtype)
                    grad_weight += torch.mm(low_grad.T, inputs, out=part)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses, correct)
        return (losses * scale).sum(), losses, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight.mul_(grad), None, None, None, None


def _distribution(states: Tensor, table: Tensor, low: Tensor, room: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The base's own distribution behind these states, from its lm_head's rows: [C, V], in the second of two tensors
    of that shape (the product is made in `low`, which may be the first); and its entropy, [C, 1]."""
    logits = room[0].copy_(torch.mm(states.to(low.dtype), table.T, out=low))
    logits.sub_(logits.amax(1, keepdim=True))
    probabilities = torch.exp(logits, out=room[1])
    total = probabilities.sum(1, keepdim=True)
    probabilities.div_(total)
    return probabilities, total.log() - torch.linalg.vecdot(probabilities, logits)[:, None]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    teacher: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of a linear head, or its divergence from a teacher.

    Args:
        hidden: [M, h].
        weight: [V, h].
        targets: [M], rows of weight; with a teacher, -1 where the written token has none.
        scale: [M], the factor of each row in the sum.
        teacher: the base's states [M, d] from which it wrote the targets, and the rows [V, d] of its lm_head. The
            loss is then KL(base || head) over those rows.

    Returns:
        The scalar sum of scale * loss, which has gradients; each row's loss [M]; and whether its target has the
        highest logit [M].
    """
    needed = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, weight, targets, scale, teacher, needed)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class Supervision:
    """What heads read and are trained towards; made on the CPU, so that a device never has to say how much it is.

    Attributes:
        tokens: [P, n + 1], as in Positions.
        rows: [M] the positions at which heads train, head after head.
        targets: [M] the logits' index of each target, -1 where the draft vocabulary lacks it.
        heads: [M] the head of each row.
        sizes: rows of each head.
        counts: [n] supervised positions of each head, targets outside the draft vocabulary included.
    """

    tokens: Tensor
    rows: Tensor
    targets: Tensor
    heads: Tensor
    sizes: list[int]
    counts: Tensor

    def to(self, device: torch.device) -> Supervision:
        """The same on a device, but for `counts`; the copy from pinned memory does not wait."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Supervision:
        """The same in page-locked memory, but for `counts`."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Supervision:
        return Supervision(
            change(self.tokens), change(self.rows), change(self.targets), change(self.heads), self.sizes, self.counts
        )


def supervise(tokens: Tensor, valid: Tensor, draft_index: Tensor | None, soft: bool) -> Supervision:
    """Find the rows that train.

    Args:
        tokens: [P, n + 1], as in Positions; on the CPU.
        valid: [P, n].
        draft_index: [V], as a speculator has it; on the CPU.
        soft: whether a teacher gives the targets, so that those outside the draft vocabulary train as well.
    """
    rows, targets = [], []
    for i in range(valid.shape[1]):
        index = tokens[:, i + 1] if draft_index is None else draft_index[tokens[:, i + 1]]
        rows.append((valid[:, i] if soft else valid[:, i] & (index >= 0)).nonzero()[:, 0])
        targets.append(index[rows[-1]])
    heads = torch.cat([torch.full((len(part),), i) for i, part in enumerate(rows)])
    return Supervision(tokens, torch.cat(rows), torch.cat(targets), heads, list(map(len, rows)), valid.sum(0))


class SpeculatorLoss(nn.Module):
    """Teacher-forced loss of every head: the mean over heads of each head's mean over its positions.

    A module, so that DistributedDataParallel can wrap it.

    Args:
        speculator: what is trained.
        head_weights: of each head's loss; they are scaled to a mean of 1.
        lm_head: [V, d] of the base: the loss is the divergence from the base's own distribution, over the draft
            vocabulary where there is one; None: cross-entropy on the written tokens.
    """

    head_weights: Tensor
    lm_head: Tensor | None

    def __init__(
        self, speculator: Speculator, head_weights: Sequence[float] | None = None, lm_head: Tensor | None = None
    ) -> None:
        super().__init__()
        self.speculator = speculator
        device = next(speculator.parameters()).device
        weights = torch.tensor(head_weights or [1.0] * speculator.config.n_predict, device=device)
        self.register_buffer("head_weights", weights / weights.mean(), persistent=False)
        if lm_head is not None and speculator.token_map is not None:
            lm_head = lm_head[speculator.token_map.to(lm_head.device)]
        self.register_buffer("lm_head", lm_head, persistent=False)
        index = speculator.draft_index
        self._draft_index = None if index is None else index.cpu()  # supervise works on the CPU

    @property
    def soft(self) -> bool:
        """Whether the base's distribution is the target."""
        return self.lm_head is not None

    def supervise(self, batch: Positions) -> Supervision:
        """The rows of a batch that train, and their targets."""
        return supervise(batch.tokens, batch.valid, self._draft_index, self.soft)

    def forward(self, states: Tensor, supervision: Supervision, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's part of the loss.

        Args:
            states: [P, d] of this micro-batch's positions.
            supervision: of these positions.
            counts: [n] supervised positions of each head in the whole batch, over all workers and micro-batches.

        Returns:
            The loss's part (a scalar with gradients), and [n, 2] sums without gradients: loss, hits. A target
            outside the draft vocabulary counts as a miss; by cross-entropy it trains nothing.
        """
        speculator, sizes = self.speculator, supervision.sizes
        n = len(sizes)
        carry = speculator.start(states)
        rows = torch.split(supervision.rows, sizes)
        hidden, taught = [], []
        for i in range(n):
            carry, state = speculator.step(i, carry, supervision.tokens[:, i])
            hidden.append(state.index_select(0, rows[i]))
            if self.soft:  # x_{t+2+i} was written from the state at t + 1 + i, which is stored 1 + i rows below
                taught.append(states.detach().index_select(0, rows[i] + 1 + i))
        scale = (self.head_weights / (n * counts.clamp(min=1))).index_select(0, supervision.heads)
        total, losses, correct = self._sum(
            hidden, torch.split(supervision.targets, sizes), torch.split(scale, sizes), taught
        )
        sums = torch.zeros(n, 2, device=losses.device, dtype=losses.dtype)
        sums.index_add_(0, supervision.heads, torch.stack([losses, correct.to(losses.dtype)], 1))
        return total, sums

    def _sum(
        self, hidden: Sequence[Tensor], targets: Sequence[Tensor], scale: Sequence[Tensor], taught: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One call for all heads that share their weight, else one a head."""
        weights = [self.speculator.head(i).weight for i in range(len(hidden))]
        if all(weight is weights[0] for weight in weights):
            teacher = None if self.lm_head is None else (torch.cat(list(taught)), self.lm_head)
            return linear_cross_entropy(
                torch.cat(list(hidden)), weights[0], torch.cat(list(targets)), torch.cat(list(scale)), teacher
            )
        parts = [
            linear_cross_entropy(
                hidden[i], weights[i], targets[i], scale[i], None if self.lm_head is None else (taught[i], self.lm_head)
            )
            for i in range(len(hidden))
        ]
        total = torch.stack([part[0] for part in parts]).sum()
        return total, torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])

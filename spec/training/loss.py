"""Head and loss in one, with a bounded number of logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spec.heads import Speculator
from spec.store.reader import Positions

CHUNK_LOGITS = {"cpu": 2**24, "mps": 2**24, "cuda": 2**28}
"""Logits [rows, V] that exist at one time, at most, by device. A chunk reads the weight and adds to its gradient once;
a GPU's products are so fast that it takes more rows to make up for that (by arithmetic; not measured)."""


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
        kind = torch.promote_types(hidden.dtype, torch.float32)
        # Rows come in G groups, one a head, that share their teachers; a chunk has C rows of each.
        groups = len(hidden) // len(teacher[0]) if teacher is not None and len(teacher[0]) else 1
        length = len(hidden) // groups
        hidden = hidden.view(groups, length, hidden.shape[1])
        targets, scale = targets.view(groups, length), scale.view(groups, length)
        losses = torch.empty(targets.shape, dtype=kind, device=hidden.device)
        correct = torch.empty(targets.shape, dtype=torch.bool, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needed else None
        grad_weight = torch.zeros_like(weight) if needed else None
        chunk = max(min(CHUNK_LOGITS[device] // (len(weight) * groups), length), 1)
        # Memory that every chunk uses again: fresh pages for each would cost a fifth of the time on a CPU.
        room = losses.new_empty(groups * chunk, len(weight))
        low_room = room if low_weight.dtype == kind else low_weight.new_empty(room.shape)
        teach = None
        if teacher is not None:
            teach = teacher[0], teacher[1].to(low_weight.dtype), losses.new_empty(chunk, len(weight))
        part = torch.empty_like(low_weight) if needed else None
        with torch.autocast(device, enabled=False):
            for start in range(0, length, chunk):
                rows = slice(start, start + chunk)
                inputs = hidden[:, rows].to(low_weight.dtype).flatten(0, 1)  # [G * C, h]
                target, factor = (tensor[:, rows].reshape(-1, 1) for tensor in (targets, scale))
                low, logits = low_room[: len(inputs)], room[: len(inputs)]  # [G * C, V]
                soft = None
                if teach is not None:
                    states, table, soft_room = teach
                    soft, entropy = _distribution(states[rows], table, low, logits, soft_room)
                logits.copy_(torch.mm(inputs, low_weight.T, out=low))
                largest, likeliest = logits.max(1)  # the first of equal ones, as drafting takes it
                logits.sub_(largest[:, None])  # sums round less for the shift
                expected = logits.gather(1, target.clamp(min=0))
                correct[:, rows] = (likeliest[:, None] == target).view(groups, -1)
                by_group = logits.view(groups, -1, len(weight))  # [G, C, V]
                if soft is not None:  # KL(p || q) = -entropy(p) - sum p log q
                    expected = (_dots(soft, by_group) + entropy).reshape(-1, 1)
                probabilities = logits.exp_()
                total = probabilities.sum(1, keepdim=True)
                losses[:, rows] = (total.log() - expected).view(groups, -1)
                if grad_hidden is not None and grad_weight is not None and part is not None:
                    grad = probabilities.mul_(factor / total)
                    if soft is None:
                        grad.scatter_add_(1, target, -factor.to(grad.dtype))
                    else:
                        by_group.addcmul_(soft, factor.view(groups, -1, 1).to(kind), value=-1)
                    low_grad = low.copy_(grad)
                    grad_hidden[:, rows] = (low_grad @ low_weight).to(hidden.dtype).view(groups, -1, hidden.shape[-1])
                    grad_weight += torch.mm(low_grad.T, inputs, out=part)
        total, losses, correct = (losses * scale).sum(), losses.flatten(), correct.flatten()
        ctx.save_for_backward(None if grad_hidden is None else grad_hidden.flatten(0, 1), grad_weight)
        ctx.mark_non_differentiable(losses, correct)
        return total, losses, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight.mul_(grad), None, None, None, None


def _distribution(states: Tensor, table: Tensor, low: Tensor, logits: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
    """The base's own distribution behind these states, from its lm_head's rows, and its entropy: [C, V], [C].

    The first is in `soft`. `low` and `logits` are room; they may be the same memory.
    """
    low, logits, probabilities = (room[: len(states)] for room in (low, logits, soft))
    logits.copy_(torch.mm(states.to(low.dtype), table.T, out=low))
    logits.sub_(logits.amax(1, keepdim=True))
    torch.exp(logits, out=probabilities)
    total = probabilities.sum(1)
    probabilities.div_(total[:, None])
    return probabilities, total.log() - _dots(probabilities, logits[None])[0]


def _dots(rows: Tensor, groups: Tensor) -> Tensor:
    """Each row's dot product with the same row of each group: [C, V], [G, C, V] -> [G, C], without writing products."""
    return torch.bmm(rows[:, None], groups.permute(1, 2, 0))[:, 0].T


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
        teacher: the base's states [R, d] from which it wrote the targets, and the rows [V, d] of its lm_head. The
            loss is then KL(base || head) over those rows. M is a multiple of R: every R rows of `hidden` have the
            same R teachers, whose distributions are computed once for all of them.

    Returns:
        The scalar sum of scale * loss, which has gradients; each row's loss [M]; and whether its target is the token
        that would be drafted [M]: that of the highest logit, the first of equal ones.
    """
    needed = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, weight, targets, scale, teacher, needed)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class Supervision:
    """What heads read and are trained towards; made on the CPU, so that a device never has to say how much it is.

    Attributes:
        tokens: [P, n + 1], as in Positions.
        rows: [M] the positions from which heads draft, head after head.
        targets: [M] the logits' index of each target, -1 where the draft vocabulary lacks it.
        heads: [M] the head that the row trains; n: none, the row fills up.
        taught: [R] the positions whose states the base wrote targets from, ascending; empty without a teacher. Each
            head has a row for each of them, in this order, which fills up where the head has no target there (in
            the first n - 1 of a supervised span).
        sizes: rows of each head.
        counts: [n] supervised positions of each head, targets outside the draft vocabulary included.
    """

    tokens: Tensor
    rows: Tensor
    targets: Tensor
    heads: Tensor
    taught: Tensor
    sizes: list[int]
    counts: Tensor

    def to(self, device: torch.device) -> Supervision:
        """The same on a device, but for `counts`; the copy from pinned memory does not wait."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Supervision:
        """The same in page-locked memory, but for `counts`."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Supervision:
        names = ("tokens", "rows", "targets", "heads", "taught")
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **changed)


def supervise(tokens: Tensor, valid: Tensor, draft_index: Tensor | None, soft: bool) -> Supervision:
    """Line up what the heads draft from with what they are trained towards.

    Args:
        tokens: [P, n + 1], as in Positions; on the CPU.
        valid: [P, n]; where it holds, the states up to the target's own are among the P positions.
        draft_index: [V], as a speculator has it; on the CPU.
        soft: whether a teacher gives the targets, so that those outside the draft vocabulary train as well.
    """
    n = valid.shape[1]
    index = tokens[:, 1:] if draft_index is None else draft_index[tokens[:, 1:]]
    if soft:  # x_{t+2+i} was written from the state at t + 1 + i, which is stored 1 + i rows below
        supervised = torch.stack([F.pad(valid[:, i], (1 + i, n - 1 - i)) for i in range(n)], 1)  # [P + n, n]
        taught = supervised.any(1).nonzero()[:, 0]
        sizes = [len(taught)] * n
        rows = torch.cat([(taught - 1 - i).clamp(min=0) for i in range(n)])
        heads = torch.where(supervised[taught], torch.arange(n), n).T.flatten()
    else:
        taught = torch.zeros(0, dtype=torch.int64)
        heads, rows = (valid & (index >= 0)).T.nonzero(as_tuple=True)
        sizes = heads.bincount(minlength=n).tolist()
    targets = torch.cat([index[part, i] for i, part in enumerate(torch.split(rows, sizes))])
    return Supervision(tokens, rows, targets, heads, taught, sizes, valid.sum(0))


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
        carry = speculator.start(states)
        rows, hidden = torch.split(supervision.rows, sizes), []
        for i, part in enumerate(rows):
            carry, state = speculator.step(i, carry, supervision.tokens[:, i])
            hidden.append(state.index_select(0, part))
        scale = F.pad(self.head_weights / (len(sizes) * counts.clamp(min=1)), (0, 1)).index_select(0, supervision.heads)
        teacher = None
        if self.lm_head is not None:
            teacher = states.detach().index_select(0, supervision.taught), self.lm_head
        total, losses, correct = self._sum(hidden, supervision.targets, scale, teacher)
        sums = torch.zeros(len(sizes) + 1, 2, device=losses.device, dtype=losses.dtype)
        sums.index_add_(0, supervision.heads, torch.stack([losses, correct.to(losses.dtype)], 1))
        return total, sums[:-1]

    def _sum(
        self, hidden: Sequence[Tensor], targets: Tensor, scale: Tensor, teacher: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One call for all heads that share their weight, else one a head."""
        weights = [self.speculator.head(i).weight for i in range(len(hidden))]
        if all(weight is weights[0] for weight in weights):
            return linear_cross_entropy(torch.cat(list(hidden)), weights[0], targets, scale, teacher)
        sizes = list(map(len, hidden))
        parts = [
            linear_cross_entropy(*part, teacher)
            for part in zip(hidden, weights, torch.split(targets, sizes), torch.split(scale, sizes), strict=True)
        ]
        total = torch.stack([part[0] for part in parts]).sum()
        return total, torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])

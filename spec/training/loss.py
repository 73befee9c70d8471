"""Head and loss in one, with a bounded number of logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spec.base.logits import PLAIN, Logits
from spec.heads import Speculator
from spec.store.reader import Positions

CHUNK_LOGITS = {"cpu": 2**24, "mps": 2**24, "cuda": 2**28}
"""Logits [rows, V] that exist at one time, at most, by device. A chunk reads the weight and adds to its gradient once;
a GPU's products are so fast that it takes more rows to make up for that (by arithmetic; not measured)."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Weighted sum of losses of ``hidden @ weight.T``, with gradients computed chunk by chunk on the way.

    The idea is that of Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024): the loss is a scalar, so its
    gradients can be made in the forward pass, while a chunk's logits are at hand, and scaled in the backward one.
    Rows come in G groups, one a head, that share their teachers; a chunk has C rows of each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor,
        teacher: tuple[Tensor, Tensor] | None,
        finish: Callable[[Tensor], Tensor] | None,
        needed: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = len(hidden) // len(teacher[0]) if teacher is not None and len(teacher[0]) else 1
        length = len(hidden) // groups
        hidden = hidden.view(groups, length, hidden.shape[1])
        targets, scale = targets.view(groups, length), scale.view(groups, length)
        room = _Room.of(hidden, weight, teacher)
        losses = torch.empty(targets.shape, dtype=room.logits.dtype, device=hidden.device)
        correct = torch.empty(targets.shape, dtype=torch.bool, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needed else None
        grad_weight = torch.zeros_like(weight) if needed else None
        part = torch.empty_like(room.weight) if needed else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, length, room.rows):
                rows = slice(start, start + room.rows)
                inputs = hidden[:, rows].to(room.weight.dtype).flatten(0, 1)  # [G * C, h]
                target, factor = (tensor[:, rows].reshape(-1, 1) for tensor in (targets, scale))
                soft = None if teacher is None else room.distribution(teacher[0][rows], finish)
                logits, likeliest = room.shifted_logits(inputs)  # [G * C, V]
                loss, total = _loss(logits, target, soft)
                losses[:, rows] = loss.view(groups, -1)
                correct[:, rows] = (likeliest[:, None] == target).view(groups, -1)
                if grad_hidden is not None and grad_weight is not None and part is not None:
                    _gradient(logits, total, target, factor, soft)
                    grad = room.low[: len(inputs)].copy_(logits)
                    grad_hidden[:, rows] = (grad @ room.weight).to(hidden.dtype).view(groups, -1, hidden.shape[-1])
                    grad_weight += torch.mm(grad.T, inputs, out=part)
        total, losses, correct = (losses * scale).sum(), losses.flatten(), correct.flatten()
        ctx.save_for_backward(None if grad_hidden is None else grad_hidden.flatten(0, 1), grad_weight)
        ctx.mark_non_differentiable(losses, correct)
        return total, losses, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight.mul_(grad), None, None, None, None, None


@dataclass(frozen=True)
class _Soft:
    """A teacher's distribution for C rows, [C, V], and its entropy [C]."""

    probabilities: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class _Room:
    """Memory that every chunk uses again: fresh pages for each would cost a fifth of the time on a CPU.

    Attributes:
        weight: [V, h] in the dtype of the products.
        table: [V, d] the teacher's rows, in the same dtype.
        rows: C, the rows of a chunk in each group.
        logits: [G * C, V] in float32 or wider.
        low: the same in the dtype of the products; the same memory where the dtypes agree.
        soft: [C, V] for the teacher's distribution.
    """

    weight: Tensor
    table: Tensor | None
    rows: int
    logits: Tensor
    low: Tensor
    soft: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, teacher: tuple[Tensor, Tensor] | None) -> _Room:
        """For the rows [G, R, h] of a call."""
        device = hidden.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        kind = torch.promote_types(hidden.dtype, torch.float32)
        groups, length, _ = hidden.shape
        V = len(weight)
        rows = max(min(CHUNK_LOGITS[device] // (V * groups), length), 1)
        logits = torch.empty(groups * rows, V, dtype=kind, device=hidden.device)
        return cls(
            weight.to(low),
            None if teacher is None else teacher[1].to(low),
            rows,
            logits,
            logits if low == kind else torch.empty_like(logits, dtype=low),
            None if teacher is None else torch.empty(rows, V, dtype=kind, device=hidden.device),
        )

    def shifted_logits(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' logits less their largest, [G * C, V], and where that is: the token that drafting would take."""
        low, logits = self.low[: len(inputs)], self.logits[: len(inputs)]
        logits.copy_(torch.mm(inputs, self.weight.T, out=low))
        largest, likeliest = logits.max(1)  # the first of equal ones
        return logits.sub_(largest[:, None]), likeliest  # sums round less for the shift

    def distribution(self, states: Tensor, finish: Callable[[Tensor], Tensor] | None) -> _Soft:
        """The base's own distribution after these states [C, d]; overwrites the logits."""
        assert self.table is not None
        assert self.soft is not None
        low, logits, probabilities = (room[: len(states)] for room in (self.low, self.logits, self.soft))
        logits.copy_(torch.mm(states.to(low.dtype), self.table.T, out=low))
        if finish is not None:
            finish(logits)
        logits.sub_(logits.amax(1, keepdim=True))
        torch.exp(logits, out=probabilities)
        total = probabilities.sum(1)
        probabilities.div_(total[:, None])
        return _Soft(probabilities, total.log() - _dots(probabilities, logits[None])[0])


def _loss(logits: Tensor, target: Tensor, soft: _Soft | None) -> tuple[Tensor, Tensor]:
    """Each row's loss, and the sum of its exponentials, [G * C, 1] both; turns the logits into exponentials.

    Cross-entropy is log sum exp(logits) - logits[target]. The divergence from a teacher p is
    log sum exp(logits) - (sum p logits + entropy(p)).
    """
    if soft is None:
        expected = logits.gather(1, target.clamp(min=0))
    else:
        by_group = logits.view(-1, *soft.probabilities.shape)  # [G, C, V]
        expected = (_dots(soft.probabilities, by_group) + soft.entropy).reshape(-1, 1)
    total = logits.exp_().sum(1, keepdim=True)
    return total.log() - expected, total


def _gradient(exponentials: Tensor, total: Tensor, target: Tensor, factor: Tensor, soft: _Soft | None) -> None:
    """Turn exponentials [G * C, V] into the gradient of the logits: factor * (softmax - target's distribution)."""
    grad = exponentials.mul_(factor / total)
    if soft is None:
        grad.scatter_add_(1, target, -factor.to(grad.dtype))
    else:
        by_group = grad.view(-1, *soft.probabilities.shape)
        by_group.addcmul_(soft.probabilities, factor.view(len(by_group), -1, 1).to(grad.dtype), value=-1)


def _dots(rows: Tensor, groups: Tensor) -> Tensor:
    """Each row's dot product with the same row of each group: [C, V], [G, C, V] -> [G, C], without writing products."""
    return torch.bmm(rows[:, None], groups.permute(1, 2, 0))[:, 0].T


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    teacher: tuple[Tensor, Tensor] | None = None,
    finish: Callable[[Tensor], Tensor] | None = None,
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
        finish: turns the teacher's lm_head times its states, in place, into its logits, where they are more than that.

    Returns:
        The scalar sum of scale * loss, which has gradients; each row's loss [M]; and whether its target is the token
        that would be drafted [M]: that of the highest logit, the first of equal ones.
    """
    needed = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, weight, targets, scale, teacher, finish, needed)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class Supervision:
    """A micro-batch: what heads read and are trained towards; made on the CPU, so that a device never has to say how
    much it is.

    Attributes:
        states: [P, d], as in Positions.
        tokens: [P, n + 1], likewise.
        rows: [M] the positions from which heads draft, head after head.
        targets: [M] the logits' index of each target, -1 where the draft vocabulary lacks it.
        heads: [M] the head that the row trains; padded rows have head index n and weight 0.
        taught: [R] the positions whose states the base wrote targets from, ascending; empty without a teacher. Each
            head has a row for each of them, in this order, padded where the head has no target there (in the first
            n - 1 of a supervised span).
        sizes: rows of each head.
        counts: [n] supervised positions of each head, targets outside the draft vocabulary included.
    """

    states: Tensor
    tokens: Tensor
    rows: Tensor
    targets: Tensor
    heads: Tensor
    taught: Tensor
    sizes: list[int]
    counts: Tensor

    @property
    def positions(self) -> int:
        """P."""
        return len(self.states)

    def to(self, device: torch.device) -> Supervision:
        """The same on a device, but for `counts`; the copy from pinned memory does not wait."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Supervision:
        """The same in page-locked memory, but for `counts`."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Supervision:
        names = ("states", "tokens", "rows", "targets", "heads", "taught")
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **changed)


class SpeculatorLoss(nn.Module):
    """Teacher-forced loss of every head: the mean over heads of each head's mean over its positions.

    A module, so that DistributedDataParallel can wrap it.

    Args:
        speculator: what is trained.
        head_weights: of each head's loss, scaled to a mean of 1.
        lm_head: [V, d] of the base: the loss is the divergence from the base's own distribution, over the draft
            vocabulary where there is one; None: cross-entropy on the written tokens.
        logits: what turns lm_head times the state into the base's logits.
        bias: [V] of lm_head.
    """

    head_weights: Tensor
    lm_head: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        speculator: Speculator,
        head_weights: Sequence[float] | None = None,
        lm_head: Tensor | None = None,
        *,
        logits: Logits = PLAIN,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.speculator = speculator
        device = next(speculator.parameters()).device
        weights = torch.tensor(head_weights or [1.0] * speculator.config.n_predict, device=device)
        self.register_buffer("head_weights", weights / weights.mean(), persistent=False)
        if lm_head is not None and speculator.token_map is not None:
            lm_head = lm_head[speculator.token_map.to(lm_head.device)]
            bias = None if bias is None else bias[speculator.token_map.to(bias.device)]
        self.register_buffer("lm_head", lm_head, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.float(), persistent=False)
        self.logits = logits
        index = speculator.draft_index
        self._draft_index = None if index is None else index.cpu()  # supervise works on the CPU

    def supervise(self, positions: Positions) -> Supervision:
        """Line up what the heads draft from with what they are trained towards, on the CPU.

        Where `positions.valid` holds, the states up to the target's own must be among the positions.
        """
        tokens, valid, n = positions.tokens, positions.valid, positions.valid.shape[1]
        index = tokens[:, 1:] if self._draft_index is None else self._draft_index[tokens[:, 1:]]
        if self.lm_head is not None:  # targets outside the draft vocabulary train as well
            # x_{t+2+i} was written from the state at t + 1 + i, which is stored 1 + i rows below.
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
        return Supervision(positions.states, tokens, rows, targets, heads, taught, sizes, valid.sum(0))

    def forward(self, batch: Supervision, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's part of the loss.

        Args:
            batch: a micro-batch.
            counts: [n] supervised positions of each head in the whole batch, over all workers and micro-batches.

        Returns:
            The loss's part (a scalar with gradients), and [n, 2] sums without gradients: loss, hits. A target
            outside the draft vocabulary counts as a miss; by cross-entropy it trains nothing.
        """
        speculator, sizes = self.speculator, batch.sizes
        carry = speculator.start(batch.states)
        rows, hidden = torch.split(batch.rows, sizes), []
        for i, part in enumerate(rows):
            carry, state = speculator.step(i, carry, batch.tokens[:, i])
            hidden.append(state.index_select(0, part))
        scale = F.pad(self.head_weights / (len(sizes) * counts.clamp(min=1)), (0, 1)).index_select(0, batch.heads)
        teacher = None
        if self.lm_head is not None:
            teacher = batch.states.detach().index_select(0, batch.taught), self.lm_head
        total, losses, correct = self._sum(hidden, batch.targets, scale, teacher)
        sums = torch.zeros(len(sizes) + 1, 2, device=losses.device, dtype=losses.dtype)
        sums.index_add_(0, batch.heads, torch.stack([losses, correct.to(losses.dtype)], 1))
        return total, sums[:-1]

    def _sum(
        self, hidden: Sequence[Tensor], targets: Tensor, scale: Tensor, teacher: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One call for all heads that share their weight, else one a head."""
        weights = [self.speculator.head(i).weight for i in range(len(hidden))]
        finish = None if self.logits == PLAIN else partial(self.logits.apply_, bias=self.bias)
        if all(weight is weights[0] for weight in weights):
            return linear_cross_entropy(torch.cat(list(hidden)), weights[0], targets, scale, teacher, finish)
        sizes = list(map(len, hidden))
        parts = [
            linear_cross_entropy(*part, teacher, finish)
            for part in zip(hidden, weights, torch.split(targets, sizes), torch.split(scale, sizes), strict=True)
        ]
        total = torch.stack([part[0] for part in parts]).sum()
        return total, torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])

"""Base and speculator trained together, with the base live at every step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spec import base as base_model
from spec import lookup
from spec.base import Base
from spec.config import Config
from spec.corpus import TokenSequence
from spec.heads import LAST, Packed, Speculator, Supervision
from spec.store.reader import Described
from spec.training.frozen import validate
from spec.training.loss import SpeculatorLoss, linear_cross_entropy
from spec.workers import Worker

BASE = "base."
SPECULATOR = "speculator."


@dataclass(frozen=True)
class JointBatch:
    """A micro-batch of whole sequences."""

    ids: Tensor  # [B, S], padded on the right
    at: Tensor  # [P] where each of the drafts' starts lies among the B * S
    heads: Supervision  # the sequences, without states, and what the heads are trained towards
    counts: Tensor  # [n + 1] supervised drafts of each head, then supervised tokens of the base: P

    @property
    def positions(self) -> int:
        return len(self.at)

    def to(self, device: torch.device) -> JointBatch:
        ids, at = (tensor.to(device, non_blocking=True) for tensor in (self.ids, self.at))
        return JointBatch(ids, at, self.heads.to(device), self.counts)


class JointLoss(nn.Module):
    """``base_loss + coeff * speculator_loss``; the gradients of both reach the base.

    base_loss is the cross-entropy of x_{t+1} after the state at t, over the same positions that the heads draft
    from. speculator_loss is SpeculatorLoss over the live states.
    """

    def __init__(self, model: nn.Module, loss: SpeculatorLoss, coeff: float) -> None:
        super().__init__()
        self.model, self.loss, self.coeff = model, loss, coeff

    def forward(self, batch: JointBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's part of the loss, and [n + 1, 2] sums of loss and hits, the base's last."""
        packed = batch.heads.packed
        states = base_model.hidden_states(self.model, batch.ids).flatten(0, 1)[batch.at]  # [P, d]
        lm_head = self.model.get_output_embeddings().weight  # type: ignore[operator]
        scale = (1.0 / counts[-1].clamp(min=1)).expand(len(states))
        base, losses, correct = linear_cross_entropy(states, lm_head, packed.ids[packed.starts + 1], scale)
        heads = replace(batch.heads, packed=replace(packed, states={LAST: states}))
        speculator, sums = self.loss(heads, counts[:-1])
        own = torch.stack([losses.sum(), correct.sum().to(losses.dtype)])[None].to(sums.dtype)
        return base + self.coeff * speculator, torch.cat([sums, own])


class JointTask:
    """What the loop trains when the base is not frozen; val chooses the checkpoint.

    The base is loaded in float32 (arithmetic is bf16 where Worker.mixed says so), and lies with the speculator on the
    worker's device.
    """

    def __init__(
        self,
        config: Config,
        base: Base,
        speculator: Speculator,
        train: Sequence[TokenSequence],
        val: Sequence[TokenSequence],
        worker: Worker,
    ) -> None:
        self.config, self.worker, self.base, self.speculator = config, worker, base, speculator
        self._train, self._val = train, val
        base.model.requires_grad_(True)
        base.model.train()
        if base.model.supports_gradient_checkpointing:
            model = base.model  # earlier releases of transformers 5 know the second name alone
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        self._loss = SpeculatorLoss(speculator, config.optim.head_weights).to(worker.device)
        self.module = JointLoss(base.model, self._loss, config.model.speculator_loss_coeff)
        self.steps_per_epoch = -(-len(train) // config.data.train_batch_size)

    def parameters(self) -> list[dict[str, Any]]:
        """The speculator's are at optim.lr, the base's at optim.base_lr; no decay on vectors and tables."""
        optim, kept = self.config.optim, self.speculator.undecayed()
        tables = {id(m.weight) for m in self.base.model.modules() if isinstance(m, nn.Embedding)}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.speculator.named_parameters():
            if parameter.requires_grad:
                decay = 0.0 if name in kept else optim.weight_decay
                groups.setdefault((optim.lr, decay), []).append(parameter)
        for parameter in self.base.model.parameters():
            decay = 0.0 if parameter.ndim < 2 or id(parameter) in tables else optim.weight_decay
            groups.setdefault((optim.base_lr, decay), []).append(parameter)
        return [{"params": found, "lr": lr, "weight_decay": decay} for (lr, decay), found in groups.items()]

    def order(self, epoch: int) -> list[int]:
        generator = np.random.default_rng([self.config.trainer.seed, epoch])
        return [int(i) for i in generator.permutation(len(self._train))]

    def share(self, batch: Sequence[int]) -> list[int]:
        return list(batch[self.worker.rank :: self.worker.world])

    def answers(self) -> Iterator[tuple[int, ...]]:
        """The supervised answers of the training split."""
        for index in self.order(0):
            yield from lookup.answers(self._train[index].ids, self._train[index].mask)

    def batches(self, parts: Iterator[Sequence[int]]) -> Iterator[JointBatch]:
        for part in parts:
            rows = [self._train[index] for index in part]
            ids, packed = padded(rows), pack(rows)
            row = torch.searchsorted(torch.tensor(packed.offsets), packed.starts, right=True) - 1
            at = row * ids.shape[1] + packed.starts - torch.tensor(packed.offsets)[row]
            heads = self._loss.supervise(packed)
            yield JointBatch(ids, at, heads, torch.cat([heads.counts, torch.tensor([len(at)])]))

    def validate(self) -> dict[str, float]:
        """As FrozenTask, over the states that the base has now; and the base's own loss."""
        mixed = self.worker.mixed(self.config.model.dtype)
        found = LiveReader(self.base, self._val, mixed)
        self.base.model.eval()
        try:
            metrics = validate(self._loss, found, self.worker, mixed)
            loss, count = found.base_loss(range(len(self._val))[self.worker.rank :: self.worker.world])
            total = self.worker.sum(torch.tensor([loss, count], dtype=torch.float32, device=self.worker.device))
            metrics["base_loss"] = float(total[0] / total[1].clamp(min=1))
        finally:
            self.base.model.train()
        return metrics

    def score(self, metrics: dict[str, float]) -> float:
        """The training loss, negated. The heads' figures alone would choose a base that has learned little."""
        return -metrics["base_loss"] - self.config.model.speculator_loss_coeff * metrics["speculator_loss"]

    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._named()}

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._named():
            parameter.copy_(weights[name])

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for prefix, module in ((BASE, self.base.model), (SPECULATOR, self.speculator)):
            yield from ((prefix + name, parameter) for name, parameter in module.named_parameters())


class LiveReader:
    """Sequences whose states a base in evaluation mode computes on request; mixed: in bf16."""

    def __init__(self, base: Base, rows: Sequence[TokenSequence], mixed: bool) -> None:
        self._base, self._rows, self._mixed = base, rows, mixed
        domains = sorted({row.domain for row in rows})
        self.manifest = Described(
            prompt_length=[row.prompt_length for row in rows],
            written=[False] * len(rows),
            domain=[domains.index(row.domain) for row in rows],
            domains=domains,
        )

    def __len__(self) -> int:
        return len(self._rows)

    def sequences(self, indices: Iterable[int]) -> Iterator[tuple[int, Packed]]:
        wanted, device = list(indices), self._base.device
        for part in [wanted[start : start + 8] for start in range(0, len(wanted), 8)]:
            rows = [self._rows[index] for index in part]
            with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._mixed):
                hidden = base_model.hidden_states(self._base.model, padded(rows).to(device))
            for number, (index, row) in enumerate(zip(part, rows, strict=True)):
                packed = pack([row])
                yield index, replace(packed, states={LAST: hidden[number, packed.starts.to(device)].float()})

    def batches(self, parts: Iterable[Sequence[int]]) -> Iterator[Packed]:
        none = replace(pack([]), states={LAST: torch.empty(0, self._base.hidden_size, device=self._base.device)})
        for part in parts:
            yield Packed.join([none, *(packed for _, packed in self.sequences(part))])

    @torch.no_grad()
    def base_loss(self, indices: Iterable[int]) -> tuple[float, int]:
        """Sum of the base's cross-entropy over the positions of sequences, and their number."""
        total, count = 0.0, 0
        for _, packed in self.sequences(indices):
            states = packed.states[LAST]
            targets = packed.ids[packed.starts + 1].to(states.device)
            loss, _, _ = linear_cross_entropy(states, self._base.lm_head, targets, torch.ones_like(states[:, 0]))
            total, count = total + float(loss), count + len(targets)
        return total, count


def pack(rows: Sequence[TokenSequence]) -> Packed:
    """Sequences one after the other, without states."""
    ids = np.concatenate([np.zeros(0, np.int64), *(row.ids for row in rows)])
    mask = np.concatenate([np.zeros(0, np.bool_), *(row.mask != 0 for row in rows)])
    return Packed.of(torch.from_numpy(ids), torch.from_numpy(mask), map(len, rows), {})


def padded(rows: Sequence[TokenSequence]) -> Tensor:
    """Ids [B, S] with zeros on the right; one row of zeros where there is no sequence, since a base needs a token."""
    width = base_model.bucket(max((len(row) for row in rows), default=1))
    ids = np.zeros((max(len(rows), 1), width), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row.ids
    return torch.from_numpy(ids)

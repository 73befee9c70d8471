"""Heads trained on the cached features of a frozen base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spec import acceptance
from spec.base import Teacher
from spec.config import Config
from spec.heads import Speculator, Supervision
from spec.store.reader import FeatureReader, SequenceReader
from spec.training.loss import SpeculatorLoss
from spec.training.tables import twin
from spec.workers import Worker


class FrozenTask:
    """What the loop trains when the base is frozen: a speculator, over a FeatureReader.

    Args:
        config: of the run.
        speculator: initialised, on the worker's device; trained in place (up to date after `tensors`).
        train_reader: what to train on.
        val_reader: what chooses the checkpoint.
        worker: this process.
        teacher: the base's own distributions, for optim.loss=kl; None: the written tokens.
    """

    def __init__(
        self,
        config: Config,
        speculator: Speculator,
        train_reader: FeatureReader,
        val_reader: FeatureReader,
        worker: Worker,
        teacher: Teacher | None = None,
    ) -> None:
        self.config, self.worker, self.speculator = config, worker, speculator
        self.train_reader, self.val_reader = train_reader, val_reader
        prompts = any(tap.positions == "all" for tap in speculator.taps)
        occurring = np.flatnonzero(train_reader.token_counts(prompts))
        tokens = torch.from_numpy(np.union1d(occurring, [0])).to(worker.device)  # 0 stands past the last sequence's end
        self._trained, self._tables = twin(speculator, tokens)
        self._mixed = worker.mixed(config.model.dtype)
        if teacher is not None:
            dtype = torch.bfloat16 if self._mixed else torch.float32
            teacher = teacher.over(speculator.token_map, worker.device, dtype)
        self._loss = SpeculatorLoss(self._trained, config.optim.head_weights, teacher).to(worker.device)

    @property
    def module(self) -> nn.Module:
        return self._loss

    @property
    def rows(self) -> tuple[str, ...]:
        return tuple(str(i + 1) for i in range(self.speculator.config.n_predict))

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train_reader) // self.config.data.train_batch_size)

    def parameters(self) -> list[dict[str, Any]]:
        """Weight decay is on everything but what the speculator names."""
        optim, kept = self.config.optim, self.speculator.undecayed()
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": decay, "lr": optim.lr} for decay in (optim.weight_decay, 0.0)
        ]
        for name, parameter in self._trained.named_parameters():
            if parameter.requires_grad:
                groups[name in kept]["params"].append(parameter)
        return groups

    def batches(self, parts: Iterator[Sequence[int]]) -> Iterator[Supervision]:
        pin = self.worker.device.type == "cuda"
        for packed in self.train_reader.batches(parts, pin):
            batch = self._loss.supervise(packed)
            yield batch.pin() if pin else batch

    def order(self, epoch: int) -> list[int]:
        return self.train_reader.order(self.config.trainer.seed, epoch)

    def share(self, batch: Sequence[int]) -> list[int]:
        return self.train_reader.share(batch, self.worker.rank, self.worker.world)

    def validate(self) -> dict[str, float]:
        """Loss and accuracy by head on val, and the exact walk."""
        self._flush()
        loss = SpeculatorLoss(self.speculator, teacher=self._loss.teacher).to(self.worker.device)
        return validate(loss, self.val_reader, self.worker, self._mixed)

    def score(self, metrics: dict[str, float]) -> float:
        return metrics["tokens_per_step"]

    def tensors(self) -> dict[str, Tensor]:
        self._flush()
        return {name: p.detach() for name, p in self.speculator.named_parameters()}

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.speculator.named_parameters():
            parameter.copy_(weights[name])
        for table in self._tables:
            table.reload()

    def _flush(self) -> None:
        for table in self._tables:
            table.flush()


def head_metrics(sums: np.ndarray[Any, Any]) -> dict[str, float]:
    """Loss and accuracy of each head and overall, from [n, 3] sums of loss, hits and count."""
    loss = sums[:, 0] / np.maximum(sums[:, 2], 1)
    accuracy = sums[:, 1] / np.maximum(sums[:, 2], 1)
    metrics = {"speculator_loss": float(loss.mean())}
    for i in range(len(sums)):
        metrics[f"loss.{i + 1}"] = float(loss[i])
        metrics[f"accuracy.{i + 1}"] = float(accuracy[i])
    return metrics


@torch.no_grad()
def validate(loss: SpeculatorLoss, reader: SequenceReader, worker: Worker, mixed: bool) -> dict[str, float]:
    """Loss and accuracy of each head with true inputs, and the exact walk's tokens per step; shared by all workers."""
    mine = list(range(len(reader)))[worker.rank :: worker.world]
    with torch.autocast(worker.device.type, dtype=torch.bfloat16, enabled=mixed):
        sums = with_true_inputs(loss, reader, mine)
        answers = acceptance.draft_answers(loss.speculator, reader, mine)
    walks = acceptance.walks(reader, answers, acceptance.head_drafts)
    gathered = worker.gather((sums.numpy(), walks))
    metrics = head_metrics(np.sum([part for part, _ in gathered], axis=0))
    everything = [walk for _, part in gathered for walk in part]
    metrics["tokens_per_step"] = acceptance.tokens_per_step(everything)
    for i, share in enumerate(acceptance.acceptance(everything, loss.speculator.config.n_predict)):
        metrics[f"acceptance.{i + 1}"] = share
    return metrics


@torch.no_grad()
def with_true_inputs(loss: SpeculatorLoss, reader: SequenceReader, indices: Sequence[int]) -> Tensor:
    """Each head's sums over sequences, fed the true tokens: [n, 3], loss, hits and positions."""
    n = loss.speculator.config.n_predict
    device = next(loss.speculator.parameters()).device
    sums = torch.zeros(n, 3, dtype=torch.float64)
    parts = [indices[start : start + 16] for start in range(0, len(indices), 16)]
    for packed in reader.batches(parts):
        batch = loss.supervise(packed).to(device)
        _, part = loss(batch, torch.ones(n, device=device))
        sums += torch.cat([part.cpu().double(), batch.counts[:, None].double()], 1)
    return sums

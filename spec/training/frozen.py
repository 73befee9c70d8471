"""Heads trained on the cached features of a frozen base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spec import acceptance, lookup
from spec.base import Teacher
from spec.config import Config
from spec.heads import Speculator, Supervision
from spec.store.reader import FeatureReader, SequenceReader
from spec.training.loss import SpeculatorLoss
from spec.training.tables import twin
from spec.workers import Worker


class FrozenTask:
    """What the loop trains when the base is frozen: a speculator, over a FeatureReader; val chooses the checkpoint.

    The speculator is on the worker's device; a call of `tensors` brings it up to date. The teacher has the base's own
    distributions, for optim.loss=kl; without one, the written tokens are the targets.
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
        weights = config.optim.head_weights or speculator.config.head_weights
        self._trained, self._tables = twin(speculator, tokens)
        self._mixed = worker.mixed(config.model.dtype)
        if teacher is not None:
            dtype = torch.bfloat16 if self._mixed else torch.float32
            teacher = teacher.over(speculator.token_map, worker.device, dtype)
        # (batch, counts) -> the loss's part, and sums of loss and hits by row
        self.module = SpeculatorLoss(self._trained, weights, teacher).to(worker.device)
        self.steps_per_epoch = -(-len(train_reader) // config.data.train_batch_size)

    def parameters(self) -> list[dict[str, Any]]:
        """AdamW's groups, each with its peak learning rate; no decay on what the speculator names."""
        optim, kept = self.config.optim, self.speculator.undecayed()
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": decay, "lr": optim.lr} for decay in (optim.weight_decay, 0.0)
        ]
        for name, parameter in self._trained.named_parameters():
            if parameter.requires_grad:
                groups[name in kept]["params"].append(parameter)
        return groups

    def order(self, epoch: int) -> list[int]:
        """All sequences, shuffled."""
        return self.train_reader.order(self.config.trainer.seed, epoch)

    def share(self, batch: Sequence[int]) -> list[int]:
        """This worker's part of a batch."""
        return self.train_reader.share(batch, self.worker.rank, self.worker.world)

    def batches(self, parts: Iterator[Sequence[int]]) -> Iterator[Supervision]:
        """The micro-batches of these sequences."""
        pin = self.worker.device.type == "cuda"
        for packed in self.train_reader.batches(parts, pin):
            batch = self.module.supervise(packed)
            yield batch.pin() if pin else batch

    def answers(self) -> Iterator[tuple[int, ...]]:
        """The supervised answers of the training split."""
        for ids, mask in self.train_reader.tokens():
            yield from lookup.answers(ids, mask)

    def validate(self) -> dict[str, float]:
        """Loss and accuracy by head on val, and the exact walk."""
        self._flush()
        loss = SpeculatorLoss(self.speculator, teacher=self.module.teacher).to(self.worker.device)
        return validate(loss, self.val_reader, self.worker, self._mixed)

    def score(self, metrics: dict[str, float]) -> float:
        """What the checkpoint is chosen by, of validate's figures; higher is better."""
        return metrics["tokens_per_step"]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is trained, each shared tensor once, where it is."""
        self._flush()
        return {name: p.detach() for name, p in self._own()}

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        for name, parameter in self._own():
            parameter.copy_(weights[name])
        for table in self._tables:
            table.reload()

    def _own(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The speculator's parameters that are not the base's."""
        return ((name, p) for name, p in self.speculator.named_parameters() if name not in self.speculator.borrowed)

    def _flush(self) -> None:
        for table in self._tables:
            table.flush()


def head_metrics(sums: NDArray[np.float64]) -> dict[str, float]:
    """Loss and accuracy of each head and overall, from [n, 3] sums of loss, hits and count."""
    loss, accuracy = (sums[:, :2] / np.maximum(sums[:, 2:], 1)).T
    metrics = {"speculator_loss": float(loss.mean())}
    for i in range(len(sums)):
        metrics |= {f"loss.{i + 1}": float(loss[i]), f"accuracy.{i + 1}": float(accuracy[i])}
    return metrics


@torch.no_grad()
def validate(loss: SpeculatorLoss, reader: SequenceReader, worker: Worker, mixed: bool) -> dict[str, float]:
    """Loss and accuracy of each head with true inputs, and the exact walk's tokens per step; shared by all workers."""
    mine = list(range(len(reader)))[worker.rank :: worker.world]
    with torch.autocast(worker.device.type, dtype=torch.bfloat16, enabled=mixed):
        sums = with_true_inputs(loss, reader, mine)
        answers = acceptance.draft_answers(loss.speculator, reader, mine)
    gathered = worker.gather((sums, acceptance.walks(reader, answers)))
    everything = [walk for _, walks in gathered for walk in walks]
    shares = acceptance.acceptance(everything, loss.speculator.config.n_predict)
    return (
        head_metrics(np.sum([part for part, _ in gathered], axis=0))
        | {"tokens_per_step": acceptance.tokens_per_step(everything)}
        | {f"acceptance.{i}": share for i, share in enumerate(shares, 1)}
    )


@torch.no_grad()
def with_true_inputs(loss: SpeculatorLoss, reader: SequenceReader, indices: Sequence[int]) -> NDArray[np.float64]:
    """Each head's sums over sequences, fed the true tokens: [n, 3], loss, hits and positions."""
    n, device = loss.speculator.config.n_predict, next(loss.speculator.parameters()).device
    sums = np.zeros((n, 3))
    for packed in reader.batches([indices[start : start + 16] for start in range(0, len(indices), 16)]):
        batch = loss.supervise(packed).to(device)
        _, part = loss(batch, torch.ones(n, device=device))
        sums += torch.cat([part.cpu().double(), batch.counts[:, None].double()], 1).numpy()
    return sums

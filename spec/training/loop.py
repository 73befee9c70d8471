"""Training heads from cached features, with one code path for one worker and many."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from spec import acceptance
from spec.config import Config
from spec.heads import Speculator
from spec.store.reader import FeatureReader, Positions, prefetch
from spec.training import schedule
from spec.training.loss import SpeculatorLoss
from spec.training.resume import Checkpoints
from spec.workers import Worker

log = logging.getLogger(__name__)

LOG_EVERY = 10
"""Steps whose sums are fetched from the device together."""


@dataclass(frozen=True)
class Progress:
    """What listeners are told.

    Attributes:
        split: "train" or "val".
        step: optimizer steps done.
        total: optimizer steps of the whole run.
        metrics: named as in docs/metrics.md.
    """

    split: str
    step: int
    total: int
    metrics: dict[str, float]


@dataclass
class Result:
    """What a run came to.

    Attributes:
        step: the step whose heads are best on val.
        val: their metrics.
        weights: their parameters, on the CPU, each shared one once.
        steps: steps of the run.
    """

    step: int = -1
    val: dict[str, float] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0

    @torch.no_grad()
    def restore(self, speculator: Speculator) -> None:
        """Give a speculator the best weights."""
        for name, parameter in speculator.named_parameters():
            parameter.copy_(self.weights[name])


def train(
    config: Config,
    speculator: Speculator,
    train_reader: FeatureReader,
    val_reader: FeatureReader,
    worker: Worker,
    checkpoints: Checkpoints,
    listen: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Train, validate every trainer.test_freq steps, and return the heads with the most tokens per step on val.

    A run that was interrupted goes on from its newest checkpoint, and tells the listener again what came before.
    Batches follow from (seed, epoch) alone; worker r of R takes every R-th sequence of each, and the loss is the
    mean over the whole batch's supervised tokens, so the number of workers and the micro-batch change nothing but
    rounding.

    Args:
        config: of the run.
        speculator: initialised, on the worker's device; trained in place.
        train_reader: what to train on.
        val_reader: what chooses the checkpoint.
        worker: this process.
        checkpoints: where to save and resume.
        listen: told of every logged step, on the first worker only.
    """
    run = _Run(config, speculator, train_reader, val_reader, worker, checkpoints, listen)
    return run.run()


class _Run:
    def __init__(
        self,
        config: Config,
        speculator: Speculator,
        train_reader: FeatureReader,
        val_reader: FeatureReader,
        worker: Worker,
        checkpoints: Checkpoints,
        listen: Callable[[Progress], None],
    ) -> None:
        self.config, self.speculator, self.worker = config, speculator, worker
        self.train_reader, self.val_reader = train_reader, val_reader
        self.checkpoints, self.listen = checkpoints, listen
        self.n = speculator.config.n_predict
        self.loss = SpeculatorLoss(speculator)
        self.parallel = DistributedDataParallel(self.loss) if worker.world > 1 else self.loss
        self.optimizer = make_optimizer(speculator, config)
        batch = config.data.train_batch_size
        self.steps_per_epoch = -(-len(train_reader) // batch)
        self.total = self.steps_per_epoch * config.trainer.total_epochs
        self.step = 0
        self.positions_seen = 0
        self.result = Result()
        self.since_best = 0
        self.history: list[tuple[str, int, dict[str, float]]] = []

    def run(self) -> Result:
        self._resume()
        sums = torch.zeros(self.n, 3, dtype=torch.float64)
        waited = trained = 0.0
        positions = 0
        stop = False
        began = time.monotonic()
        for micro_batches in () if self._exhausted() else prefetch(self._batches()):
            waited += time.monotonic() - began
            step_sums, norm = self._step(micro_batches)
            trained += time.monotonic() - began
            sums += step_sums
            positions += sum(map(len, micro_batches))
            self.step += 1
            last = self.step == self.total
            saving = self.step % self.config.trainer.save_freq == 0 or last
            if self.step % LOG_EVERY == 0 or saving:  # a checkpoint holds no half-counted sums
                self._log(sums, norm, positions, waited, trained)
                sums.zero_()
                waited, trained, positions = 0.0, 0.0, 0
            if self.step % self.config.trainer.test_freq == 0 or last:
                stop = self._validate()
            if saving or stop:
                self._save()
            if stop:
                break
            began = time.monotonic()
        self.result.steps = self.step
        return self.result

    def _batches(self) -> Iterator[list[Positions]]:
        """This worker's micro-batches of every step still to do."""
        size, micro = self.config.data.train_batch_size, self.config.data.micro_batch_size_per_gpu

        def steps() -> Iterator[list[list[int]]]:
            begun, done = divmod(self.step, self.steps_per_epoch)
            for epoch in range(begun, self.config.trainer.total_epochs):
                order = self.train_reader.order(self.config.trainer.seed, epoch)
                for start in range(done * size if epoch == begun else 0, len(order), size):
                    batch = order[start : start + size]
                    mine = self.train_reader.share(batch, self.worker.rank, self.worker.world)
                    yield [mine[at : at + micro] for at in range(0, len(mine), micro)] or [[]]

        ahead, here = itertools.tee(steps())
        parts = (part for step in ahead for part in step)
        batches = self.train_reader.batches(parts, self.n, pin=self.worker.device.type == "cuda")
        for step in here:
            yield [next(batches) for _ in step]

    def _step(self, micro_batches: list[Positions]) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; returns [n, 3] sums over all workers (loss, hits, count) and the gradient's norm."""
        rate = schedule.factor(self.config.optim, self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optim.lr * rate
        device = self.worker.device
        counts = torch.stack([batch.valid.sum(0) for batch in micro_batches]).sum(0).to(device)
        counts = self.worker.sum(counts)
        sums = torch.zeros(self.n, 2, device=device)
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            held = isinstance(self.parallel, DistributedDataParallel) and not last
            with self.parallel.no_sync() if held else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.mixed):
                    loss, part = self.parallel(batch.to(device), counts)
                # DistributedDataParallel averages gradients over workers, and the loss is a sum over them.
                (loss * self.worker.world).backward()
            sums += part
        norm = torch.nn.utils.clip_grad_norm_(self.speculator.parameters(), self.config.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.worker.sum(sums)
        return torch.cat([sums, counts[:, None]], 1).double().cpu(), norm

    @property
    def mixed(self) -> bool:
        """bf16 arithmetic over float32 weights, unless everything is asked to be float32."""
        return self.config.model.dtype != "float32"

    def _log(self, sums: torch.Tensor, norm: torch.Tensor, positions: int, waited: float, seconds: float) -> None:
        total = self.worker.sum(torch.tensor([positions, waited], dtype=torch.float64, device=self.worker.device))
        self.positions_seen += int(total[0])
        if not self.worker.first:
            return
        metrics = head_metrics(sums.numpy())
        metrics |= {
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": float(norm),
            "positions_per_second": float(total[0]) / seconds,
            "positions_seen": float(self.positions_seen),
            "data_wait": float(total[1]) / self.worker.world / seconds,
            "epoch": self.step / self.steps_per_epoch,
        }
        self._tell("train", metrics)

    def _validate(self) -> bool:
        """Measure on val, keep the best heads; returns whether to stop early."""
        metrics = validate(self.speculator, self.val_reader, self.worker, self.mixed)
        better = metrics["tokens_per_step"] > self.result.val.get("tokens_per_step", 0.0)
        if better:
            self.since_best = 0
            self.result.step, self.result.val = self.step, metrics
            self.result.weights = {k: v.detach().cpu().clone() for k, v in self.speculator.named_parameters()}
        else:
            self.since_best += 1
        if self.worker.first:
            self._tell("val", metrics)
        return self._exhausted()

    def _exhausted(self) -> bool:
        """Whether val has not improved for trainer.early_stop validations."""
        patience = self.config.trainer.early_stop
        return patience is not None and self.since_best >= patience

    def _tell(self, split: str, metrics: dict[str, float]) -> None:
        self.history.append((split, self.step, metrics))
        self.listen(Progress(split, self.step, self.total, metrics))

    def _save(self) -> None:
        if not self.worker.first:
            return
        self.checkpoints.save(
            self.step,
            self.speculator,
            {
                "optimizer": self.optimizer.state_dict(),
                "positions_seen": self.positions_seen,
                "best": {"step": self.result.step, "val": self.result.val, "weights": self.result.weights},
                "since_best": self.since_best,
                "history": self.history,
            },
        )

    def _resume(self) -> None:
        found = self.checkpoints.newest()
        if found is None:
            return
        folder, state = found
        weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        self.speculator.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.positions_seen = state["step"], state["positions_seen"]
        self.result.step, self.result.val = state["best"]["step"], state["best"]["val"]
        self.result.weights, self.since_best = state["best"]["weights"], state["since_best"]
        self.history = state["history"]
        if self.worker.first:
            log.info("resuming at step %d of %d", self.step, self.total)
            for split, step, metrics in self.history:
                self.listen(Progress(split, step, self.total, metrics))


def make_optimizer(speculator: Speculator, config: Config) -> torch.optim.AdamW:
    """AdamW with weight decay on everything but norms and the parameters that the speculator names."""
    optim, kept = config.optim, speculator.undecayed()
    named = [(name, p) for name, p in speculator.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if name not in kept], "weight_decay": optim.weight_decay},
        {"params": [p for name, p in named if name in kept], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)


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
def validate(speculator: Speculator, reader: FeatureReader, worker: Worker, mixed: bool) -> dict[str, float]:
    """Loss and accuracy of each head with true inputs, and the exact walk's tokens per step; shared by all workers."""
    mine = list(range(len(reader)))[worker.rank :: worker.world]
    n = speculator.config.n_predict
    with torch.autocast(worker.device.type, dtype=torch.bfloat16, enabled=mixed):
        sums = with_true_inputs(speculator, reader, mine)
        answers = acceptance.draft_answers(speculator, reader, mine)
    walks = acceptance.walks(reader, answers, acceptance.head_drafts)
    gathered = worker.gather((sums.numpy(), walks))
    metrics = head_metrics(np.sum([part for part, _ in gathered], axis=0))
    everything = [walk for _, part in gathered for walk in part]
    metrics["tokens_per_step"] = acceptance.tokens_per_step(everything)
    for i, share in enumerate(acceptance.acceptance(everything, n)):
        metrics[f"acceptance.{i + 1}"] = share
    return metrics


@torch.no_grad()
def with_true_inputs(speculator: Speculator, reader: FeatureReader, indices: Sequence[int]) -> torch.Tensor:
    """Each head's sums over sequences, fed the true tokens: [n, 3], loss, hits and positions."""
    n = speculator.config.n_predict
    device = next(speculator.parameters()).device
    loss = SpeculatorLoss(speculator)
    sums = torch.zeros(n, 3, dtype=torch.float64)
    counts = torch.ones(n, device=device)
    parts = [indices[start : start + 16] for start in range(0, len(indices), 16)]
    for batch in reader.batches(parts, n):
        _, part = loss(batch.to(device), counts)
        sums += torch.cat([part.cpu(), batch.valid.sum(0)[:, None]], 1).double()
    return sums

"""The training loop: one code path for one worker and many, for a frozen base and a live one."""

from __future__ import annotations

import contextlib
import itertools
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from spec.device import fetch, mark, send
from spec.errors import SpecError
from spec.heads import Supervision
from spec.store.reader import prefetch
from spec.training import schedule
from spec.training.frozen import FrozenTask, head_metrics
from spec.training.joint import JointBatch, JointTask
from spec.training.resume import Checkpoints

log = logging.getLogger(__name__)

LOG_EVERY = 10
"""Steps whose sums are fetched from the device together."""


Task = FrozenTask | JointTask


@dataclass(frozen=True)
class Progress:
    """What listeners are told: figures of a split ("train" or "val"), as docs/metrics.md names them, after `step` of
    `total` optimizer steps, and the time when they were measured, in seconds since the epoch."""

    split: str
    step: int
    metrics: dict[str, float]
    time: float
    total: int


@dataclass
class Result:
    """The result of a run."""

    step: int = -1  # whose weights are best on val
    val: dict[str, float] = field(default_factory=dict)  # their metrics
    # A copy of Task.tensors on the CPU; on the first worker alone, since of a large base one is enough.
    weights: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0  # of the run


class StoppedError(SpecError):
    """The run was asked to stop; its checkpoint is written."""


def run(
    task: Task,
    checkpoints: Checkpoints,
    listen: Callable[[Progress], None] = lambda progress: None,
    stopping: Callable[[], bool] = lambda: False,
    advance: Callable[[int, int], object] = lambda step, total: None,
) -> Result:
    """Train, validate every trainer.test_freq steps, and return the weights that Task.score finds best on val.

    A run that was interrupted goes on from its newest checkpoint, and tells the listener again what came before.
    Batches follow from (seed, epoch) alone; each worker takes its part of each batch, and the loss is the mean over
    the whole batch's supervised tokens, so the number of workers and the micro-batch change nothing but rounding.

    Args:
        task: what is trained.
        checkpoints: where to save and resume.
        listen: told of every logged step, on the first worker only.
        stopping: asked at every step whether to save and leave; one worker's yes counts for all.
        advance: told the steps done and those of the whole run, before the first step and after each.

    Raises:
        StoppedError: after saving, because of `stopping`.
    """
    return _Run(task, checkpoints, listen, stopping).run(advance)


class _Run:
    def __init__(
        self, task: Task, checkpoints: Checkpoints, listen: Callable[[Progress], None], stopping: Callable[[], bool]
    ) -> None:
        self.task, self.checkpoints, self.listen, self.stopping = task, checkpoints, listen, stopping
        self.config, self.worker = task.config, task.worker
        self.optimizer = torch.optim.AdamW(task.parameters(), betas=self.config.optim.betas, fused=True)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.total = task.steps_per_epoch * self.config.trainer.total_epochs
        self.mixed = self.worker.mixed(self.config.model.dtype)
        self.step = self.positions_seen = self.since_best = 0
        self.result = Result()
        self.history: list[tuple[str, int, dict[str, float], float]] = []
        # Since the last log, on this worker: loss, hits and count of each head and of a live base; then positions.
        exact = torch.device("cpu") if self.worker.device.type == "mps" else self.worker.device  # MPS has no float64
        rows = task.speculator.config.n_predict + isinstance(task, JointTask)
        self.sums = torch.zeros(rows, 3, dtype=torch.float64, device=exact)
        self.positions = 0
        self.waited = self.trained = 0.0
        self._resume()
        distributed = self.worker.world > 1
        self.parallel = DistributedDataParallel(task.module, broadcast_buffers=False) if distributed else task.module

    def run(self, advance: Callable[[int, int], object]) -> Result:
        advance(self.step, self.total)
        began = time.monotonic()
        asked = fetch(torch.zeros(()))  # whether any worker was asked to stop
        idle = mark(self.worker.device)
        for micro_batches in () if self._exhausted() else prefetch(self._batches()):
            self.waited += time.monotonic() - began if idle() else 0.0
            norm, asked_now = self._step(micro_batches)
            idle = mark(self.worker.device)
            self.step += 1
            advance(self.step, self.total)
            last = self.step == self.total
            leaving = bool(asked()) and not last  # as of the step before, so that this one goes on meanwhile
            saving = self.step % self.config.trainer.save_freq == 0 or last or leaving
            telling = self.step % LOG_EVERY == 0 or last
            validating = self.step % self.config.trainer.test_freq == 0 or last
            if telling or validating or saving:
                self._check(norm)  # waits for the device, whose work until here is part of the time
            self.trained += time.monotonic() - began
            if telling:
                self._log(norm)
            stop = self._validate() if validating else False
            if saving or stop:
                self._save()
            if leaving:
                self.worker.gather(None)  # nobody leaves before the first worker has written
                raise StoppedError(
                    f"stopped at step {self.step} of {self.total}, and saved in {self.checkpoints.folder}; "
                    "run the same command again to go on"
                )
            if stop:
                break
            asked, began = asked_now, time.monotonic()
        self.result.steps = self.step
        return self.result

    def _batches(self) -> Iterator[list[Supervision | JointBatch]]:
        """This worker's micro-batches of every step still to do."""
        size, micro = self.config.data.train_batch_size, self.config.data.micro_batch_size_per_gpu

        def steps() -> Iterator[list[list[int]]]:
            begun, done = divmod(self.step, self.task.steps_per_epoch)
            for epoch in range(begun, self.config.trainer.total_epochs):
                order = self.task.order(epoch)
                for start in range(done * size if epoch == begun else 0, len(order), size):
                    mine = self.task.share(order[start : start + size])
                    yield [mine[at : at + micro] for at in range(0, len(mine), micro)] or [[]]

        ahead, here = itertools.tee(steps())
        batches: Iterator[Supervision | JointBatch] = self.task.batches(part for step in ahead for part in step)
        for step in here:
            yield [next(batches) for _ in step]

    def _step(self, micro_batches: list[Supervision | JointBatch]) -> tuple[Tensor, Callable[[], Tensor]]:
        """One optimizer step; returns the gradient's norm, and what says whether any worker was asked to stop.

        Nothing here waits for the device.
        """
        rate = schedule.factor(self.config.optim, self.step, self.total)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * rate
        device = self.worker.device
        counted = torch.stack([batch.counts for batch in micro_batches]).sum(0)
        own = send(torch.cat([counted, torch.tensor([int(self.stopping())])]), device)
        shared = self.worker.sum(own.clone())
        counts, asked = shared[:-1], fetch(shared[-1])
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            held = isinstance(self.parallel, DistributedDataParallel) and not last
            with self.parallel.no_sync() if held else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.mixed):
                    loss, part = self.parallel(batch.to(device), counts)
                # DistributedDataParallel averages gradients over workers, and the loss is a sum over them.
                (loss * self.worker.world).backward()
            self.sums[:, :2] += part.to(self.sums)
        self.sums[:, 2] += own[:-1].to(self.sums)
        self.positions += sum(batch.positions for batch in micro_batches)
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.config.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, asked

    def _check(self, norm: Tensor) -> None:
        if not norm.isfinite():
            raise SpecError(
                f"the gradient at step {self.step} is {float(norm)}: training has diverged. Lower optim.lr, raise "
                "optim.warmup_ratio or set model.dtype=float32"
            )

    def _log(self, norm: Tensor) -> None:
        sums, positions = self._total_sums()
        waited = self.worker.sum(torch.tensor(self.waited, dtype=torch.float32, device=self.worker.device))
        self.positions_seen += positions
        if self.worker.first:
            heads = self.task.speculator.config.n_predict
            metrics = head_metrics(sums[:heads].numpy())
            for loss, hits, count in sums[heads:].tolist():
                metrics |= {"base_loss": loss / max(count, 1), "base_accuracy": hits / max(count, 1)}
            metrics |= {
                "lr": self.optimizer.param_groups[0]["lr"],
                "grad_norm": float(norm),
                "positions_per_second": positions / self.trained,
                "positions_seen": float(self.positions_seen),
                "data_wait": float(waited) / self.worker.world / self.trained,
                "epoch": self.step / self.task.steps_per_epoch,
                "memory_gb": _memory(self.worker.device) / 1e9,
            }
            self._tell("train", metrics)
        self.sums.zero_()
        self.positions, self.waited, self.trained = 0, 0.0, 0.0

    def _total_sums(self) -> tuple[Tensor, int]:
        """Sums and positions of all workers since the last log."""
        positions = torch.tensor([[self.positions, 0, 0]]).to(self.sums)
        total = self.worker.sum(torch.cat([self.sums, positions])).cpu()
        return total[:-1], int(total[-1, 0])

    def _validate(self) -> bool:
        """Measure on val, keep the best weights; returns whether to stop early."""
        metrics = self.task.validate()
        better = not self.result.val or self.task.score(metrics) > self.task.score(self.result.val)
        if better:
            self.since_best = 0
            self.result.step, self.result.val = self.step, metrics
            tensors = self.task.tensors() if self.worker.first else {}
            self.result.weights = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        else:
            self.since_best += 1
        seen = self.positions_seen + self._total_sums()[1]
        if self.worker.first:
            self._tell("val", {"positions_seen": float(seen), **metrics})
        return self._exhausted()

    def _exhausted(self) -> bool:
        """Whether val has not improved for trainer.early_stop validations."""
        patience = self.config.trainer.early_stop
        return patience is not None and self.since_best >= patience

    def _tell(self, split: str, metrics: dict[str, float]) -> None:
        self.history.append((split, self.step, metrics, time.time()))
        self.listen(Progress(*self.history[-1], self.total))

    def _save(self) -> None:
        sums, positions = self._total_sums()
        if not self.worker.first:
            return
        device, tensors = self.worker.device, self.task.tensors()  # brings the speculator up to date, too
        self.checkpoints.save(
            self.step,
            self.task.speculator,
            {
                "weights": tensors,
                "optimizer": self.optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                "positions_seen": self.positions_seen,
                "best": {"step": self.result.step, "val": self.result.val, "weights": self.result.weights},
                "since_best": self.since_best,
                "history": self.history,
                "sums": sums,
                "positions": positions,
                "seconds": (self.waited, self.trained),
            },
        )

    def _resume(self) -> None:
        state = self.checkpoints.newest()
        if state is None:
            return
        self.task.restore(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if self.worker.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.worker.device)
        self.step, self.positions_seen = state["step"], state["positions_seen"]
        self.result.step, self.result.val = state["best"]["step"], state["best"]["val"]
        self.since_best = state["since_best"]
        self.history = state["history"]
        if self.worker.first:
            self.result.weights = state["best"]["weights"]
            self.sums += state["sums"].to(self.sums)
            self.positions = state["positions"]
            self.waited, self.trained = state["seconds"]
            log.info("resuming at step %d of %d", self.step, self.total)
            for entry in self.history:
                self.listen(Progress(*entry, self.total))


def _memory(device: torch.device) -> float:
    """The most bytes that this process has held so far, on the device or, without one, in the machine's memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else most * 1024)

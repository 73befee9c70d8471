"""Two ways to train heads, step by step over the same sequences: this project's, and that of the public trainers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from spec.base import Teacher
from spec.config import Config
from spec.device import synchronize
from spec.heads import LAST, Speculator, supervise
from spec.store.reader import FeatureReader
from spec.training.frozen import FrozenTask
from spec.workers import Worker


@dataclass(frozen=True)
class Recipe:
    """How heads are trained."""

    optimizer: torch.optim.Optimizer
    step: Callable[[int], tuple[int, float]]  # trains on one part of the data; returns its positions and its loss


def ours(
    config: Config,
    speculator: Speculator,
    reader: FeatureReader,
    parts: Sequence[Sequence[int]],
    worker: Worker,
    teacher: Teacher | None = None,
    prepare: Callable[[torch.nn.Module], torch.nn.Module] = lambda module: module,
) -> Recipe:
    """What the project's loop does, without its log. `prepare` may compile the module that makes the loss."""
    task = FrozenTask(config, speculator, reader, reader, worker, teacher)
    optimizer = torch.optim.AdamW(task.parameters(), betas=config.optim.betas, fused=True)
    batches = list(task.batches(iter(parts)))
    module = prepare(task.module)

    def step(number: int) -> tuple[int, float]:
        batch = batches[number].to(worker.device)
        counts = batches[number].counts.to(worker.device)
        with torch.autocast(worker.device.type, dtype=torch.bfloat16, enabled=worker.mixed(config.model.dtype)):
            loss, _ = module(batch, counts)
        return batch.positions, update(optimizer, loss)

    return Recipe(optimizer, step)


def public(
    config: Config, speculator: Speculator, reader: FeatureReader, parts: Sequence[Sequence[int]], worker: Worker
) -> Recipe:
    """The public trainers' recipe: all heads' logits stacked, cross-entropy over them, dense gradients."""
    n, index = speculator.config.n_predict, speculator.draft_index
    optimizer = plain_optimizer(config, speculator)
    batches = []
    for packed in reader.batches(parts):
        # Lined up beforehand, as ours: tokens [P, n + 1], and targets [P, n] that are -100 where nothing trains.
        supervision = supervise(packed, n, None if index is None else index.cpu())
        targets = torch.full((len(packed.starts), n), -100)
        targets[supervision.rows, supervision.depths] = supervision.targets
        tokens = F.pad(packed.ids, (0, n))[packed.starts[:, None] + torch.arange(1, n + 1)]
        held = (packed.states[LAST], tokens, targets)
        batches.append([tensor.pin_memory() if worker.device.type == "cuda" else tensor for tensor in held])
    mixed = config.model.dtype != "float32"

    def step(number: int) -> tuple[int, float]:
        states, tokens, targets = (tensor.to(worker.device, non_blocking=True) for tensor in batches[number])
        with torch.autocast(worker.device.type, dtype=torch.bfloat16, enabled=mixed):
            logits = speculator(states, tokens)  # [n, P, V]
            losses = [F.cross_entropy(logits[i].float(), targets[:, i], ignore_index=-100) for i in range(n)]
            loss = torch.stack(losses).mean()
        return len(states), update(optimizer, loss)

    return Recipe(optimizer, step)


def plain_optimizer(config: Config, speculator: Speculator) -> torch.optim.AdamW:
    """AdamW over every parameter that is the speculator's own."""
    kept, own = speculator.undecayed(), dict(speculator.named_parameters())
    own = {name: parameter for name, parameter in own.items() if name not in speculator.borrowed}
    groups = [
        {"params": [p for name, p in own.items() if name not in kept], "weight_decay": config.optim.weight_decay},
        {"params": [p for name, p in own.items() if name in kept], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, fused=True)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """Step along the loss's gradient; the loss."""
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


@dataclass(frozen=True)
class Measured:
    """What a recipe came to."""

    rate: float  # positions a second, after the warm-up
    memory: int  # bytes at most, above what was held before the first step and the optimizer's state
    losses: list[float]  # of each step


def measure(recipe: Recipe, device: torch.device, steps: int, warmup: int) -> Measured:
    """Train for some steps; the first `warmup` of them are not timed."""
    static = forget_peak(device)
    began, positions, losses = 0.0, 0, []
    for number in range(steps):
        if number == warmup:
            began = time.perf_counter()
        size, loss = recipe.step(number)  # waits for the device
        positions += size if number >= warmup else 0
        losses.append(loss)
    rate = positions / (time.perf_counter() - began)
    state = [t for each in recipe.optimizer.state.values() for t in each.values() if isinstance(t, Tensor)]
    return Measured(rate, peak(device) - static - sum(t.nbytes for t in state), losses)


def forget_peak(device: torch.device) -> int:
    """Bytes held now, on the device or by this process on Linux; the peak counts anew from here."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes held since forget_peak."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(name: str) -> int:
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * 1024

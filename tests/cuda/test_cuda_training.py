"""The training loop on the device: it learns as on the CPU, goes on after an interruption, and reads pinned memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from spec.heads import LAST
from spec.training import loop
from spec.training.loop import Progress, Result
from spec.training.resume import Checkpoints
from spec.workers import Worker
from tests.spec.training import runs
from tests.spec.training.runs import ALONE, N, frozen_task, losses_of, make_config, make_speculator

LOSSES = [{"optim": {"lr": 0.01, "loss": loss}} for loss in ("ce", "kl")]
ONE_VALIDATION = {"total_epochs": 2, "test_freq": 1000, "save_freq": 3}
"""The best weights are the last ones then: rounding could choose others."""


def run(
    store: Path, folder: Path, worker: Worker, stop: Any = None, **changed: dict[str, Any]
) -> tuple[Result, list[float]]:
    """What comes of a run, and its losses."""
    told: list[Progress] = []

    def listen(progress: Progress) -> None:
        told.append(progress)
        if stop is not None:
            stop(progress)

    config = make_config(**{"trainer": ONE_VALIDATION, **changed})
    task = frozen_task(config, store, worker, make_speculator(method="sum_lstm").to(worker.device))
    return loop.run(task, Checkpoints(folder, "key"), listen), losses_of(told)


@pytest.mark.parametrize("changed", LOSSES, ids=["ce", "kl"])
def test_it_learns_as_on_the_cpu(changed: dict[str, Any], store: Path, tmp_path: Path, worker: Worker) -> None:
    ours, here = run(store, tmp_path / "device", worker, **changed)
    theirs, there = run(store, tmp_path / "cpu", ALONE, **changed)
    assert here == pytest.approx(there, rel=1e-3)
    for name, weight in theirs.weights.items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=0.02, atol=2e-3)


def test_in_bfloat16_it_learns_nearly_the_same(store: Path, tmp_path: Path, worker: Worker) -> None:
    _, mixed = run(store, tmp_path / "mixed", worker, model={"dtype": "bfloat16", "speculator": {"n_predict": N}})
    _, exact = run(store, tmp_path / "exact", worker)
    assert mixed == pytest.approx(exact, rel=0.05)


def test_a_run_goes_on_where_it_was_interrupted(store: Path, tmp_path: Path, worker: Worker) -> None:
    expected, whole = run(store, tmp_path / "whole", worker)
    with pytest.raises(runs.InterruptedRunError):
        run(store, tmp_path / "broken", worker, runs.interrupt("train", 10))
    found, resumed = run(store, tmp_path / "broken", worker)
    assert found.steps == expected.steps
    assert resumed == pytest.approx(whole, rel=1e-4)
    for name, weight in expected.weights.items():  # a GPU adds gradients up in an order of its own
        torch.testing.assert_close(found.weights[name], weight, rtol=1e-3, atol=1e-4)


def test_batches_arrive_from_pinned_memory(store: Path, worker: Worker) -> None:
    task = frozen_task(make_config(), store, worker, make_speculator().to(worker.device))
    parts = [task.order(0)[start : start + 4] for start in range(0, 12, 4)]
    pageable = frozen_task(make_config(), store, ALONE)
    for found, expected in zip(task.batches(iter(parts)), pageable.batches(iter(parts)), strict=True):
        copied = found.to(worker.device)
        states, moved = found.packed.states[LAST], copied.packed.states[LAST]
        assert states.is_pinned() == (worker.device.type == "cuda")
        assert found.rows.is_pinned() == (worker.device.type == "cuda")
        assert moved.device == worker.device
        assert torch.equal(moved.cpu(), expected.packed.states[LAST])
        assert torch.equal(copied.targets.cpu(), expected.targets)


def test_data_parallel_training_of_one_is_plain_training(store: Path, tmp_path: Path, worker: Worker) -> None:
    """NCCL cannot be shown with two workers on one GPU; this shows that it starts, and what it is given."""
    gradients = []
    for parallel in (False, True):
        task = frozen_task(make_config(), store, worker, make_speculator().to(worker.device))
        batch = next(iter(task.batches(iter([task.order(0)[:4]])))).to(worker.device)
        module: torch.nn.Module = task.module
        if parallel:
            backend = "nccl" if worker.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
        try:
            if parallel:
                module = DistributedDataParallel(module, broadcast_buffers=False)
            loss, _ = module(batch, batch.counts.to(worker.device))
            loss.backward()
        finally:
            if parallel:
                dist.destroy_process_group()
        gradients.append([p.grad for group in task.parameters() for p in group["params"]])
    for alone, together in zip(*gradients, strict=True):
        torch.testing.assert_close(together, alone)

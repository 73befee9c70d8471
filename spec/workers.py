"""Which of several workers this process is, as torchrun (or any launcher that sets its variables) says."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from spec.device import arithmetic, choose_device


@dataclass(frozen=True)
class Worker:
    """One process of `world` that work together; rank 0 speaks for all."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this worker writes and logs."""
        return self.rank == 0

    def mixed(self, dtype: str) -> bool:
        """Whether training with model.dtype computes in bf16 over float32 weights; not on a device without bf16."""
        return dtype != "float32" and arithmetic("bfloat16", self.device) == torch.bfloat16

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every worker's tensor, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def this_worker() -> Worker:
    """This process's place, from RANK and WORLD_SIZE; its CUDA device becomes the current one."""
    device = choose_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return Worker(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), device)


@contextlib.contextmanager
def joined() -> Iterator[Worker]:
    """This worker, connected with the others: NCCL on CUDA, gloo elsewhere."""
    worker = this_worker()
    if worker.world > 1:
        dist.init_process_group("nccl" if worker.device.type == "cuda" else "gloo")
    try:
        yield worker
    finally:
        if worker.world > 1:
            dist.destroy_process_group()

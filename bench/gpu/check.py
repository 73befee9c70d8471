"""What every section of the check is given."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu import figures
from bench.gpu.sizes import Sizes
from spec.device import synchronize

OPERATIONS = 20
"""Lines of a profile."""


@dataclass(frozen=True)
class Check:
    """One run of the check, as a section sees it.

    Attributes:
        section: its name.
        device: what it computes on.
        sizes: of everything.
        out: the folder of results.
        work: a folder for what is needed only during the run; sections share it.
        until: when the section has to be over, by time.time().
    """

    section: str
    device: torch.device
    sizes: Sizes
    out: Path
    work: Path
    until: float

    def figure(self, name: str, value: str) -> None:
        """Write a figure down."""
        figures.add(self.out, self.section, name, value)

    def left(self) -> float:
        """Seconds until the section has to be over; a little less, so that it can say what it waited for."""
        return self.until - 5 - time.time()

    def profile(self, title: str, work: Callable[..., object], *arguments: object) -> None:
        """Run something, and append its dearest operations to profile.txt."""
        cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
            work(*arguments)
            synchronize(self.device)
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=OPERATIONS, max_name_column_width=60)
        with (self.out / "profile.txt").open("a") as file:
            file.write(f"== {title}\n{table}\n\n")

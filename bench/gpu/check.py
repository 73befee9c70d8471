"""What every section of the check is given, and the figures that it writes down."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.sizes import Sizes
from spec.device import synchronize

SHARES = {"right": 0.3, "default": 0.5, "base": 0.3, "training": 0.45, "decoding": 0.25, "eagle3": 0.4}
"""The sections in their order, and how much of the whole time each may take, so that one that hangs does not cost the
others theirs."""

FIGURES = "figures.csv"


@dataclass(frozen=True)
class Check:
    """One run of the check, as a section sees it."""

    section: str
    device: torch.device
    sizes: Sizes
    out: Path  # the folder of results
    work: Path  # a folder for what is needed only during the run; sections share it
    until: float  # when the section has to be over, by time.time()

    def figure(self, name: str, value: str, expected: str = "") -> None:
        """Write a figure down at once, with what is expected of it."""
        with (self.out / FIGURES).open("a", newline="") as file:
            csv.writer(file).writerow([self.section, name, value, expected])
        print(f"{self.section}: {name}: {value}", flush=True)

    def left(self) -> float:
        """Seconds until the section has to be over; a little less, so that it can say what it waited for."""
        return self.until - 5 - time.time()

    def profile(self, title: str, work: Callable[..., object], *arguments: object) -> None:
        """Run something, and append its 20 dearest operations to profile.txt."""
        cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
            work(*arguments)
            synchronize(self.device)
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60)
        with (self.out / "profile.txt").open("a") as file:
            file.write(f"== {title}\n{table}\n\n")


def read(folder: Path) -> list[list[str]]:
    """All figures so far: section, name, value and what is expected."""
    path = folder / FIGURES
    return list(csv.reader(path.read_text().splitlines())) if path.is_file() else []

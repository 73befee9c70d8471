"""What the benchmarks share: real states of the default pipeline, and tables."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from spec import base as base_model
from spec import config as config_module
from spec import lineage
from spec.base import Base, Teacher
from spec.config import Config
from spec.heads import LAST
from spec.store.manifest import Manifest
from spec.store.reader import FeatureReader
from stages import common

METHODS: dict[str, Sequence[str]] = {
    "sum_rnn": (),
    "eagle3": (
        *("model.speculator.method=eagle3", "trainer.total_epochs=6", "decode.draft_len=5"),
        *("data.train_batch_size=2", "data.micro_batch_size_per_gpu=2", "optim.lr=0.0015"),
    ),
}
"""Each method's best settings, as overrides of params.yaml."""


def default_config(*overrides: str) -> Config:
    """params.yaml of the working directory."""
    return config_module.load(Path("params.yaml"), overrides)


def load_base(config: Config) -> Base:
    """The base that fetch resolved."""
    sources = common.read_sources()
    return base_model.load(config.model, common.base_folder(config, sources), sources["base"]["weights"])


def reader(config: Config, split: str) -> FeatureReader:
    """The cached features of a split, as far as the config's method reads them."""
    manifest = Manifest.load(common.features_path(split))
    taps = config.model.speculator.taps(manifest.layers)
    return FeatureReader(manifest.reading(taps), common.store_root(config))


def teacher_of(config: Config, tables: Mapping[str, torch.Tensor]) -> Teacher | None:
    """The base's own distributions, where optim.loss says that training learns from them."""
    return Teacher(tables["lm_head"]) if config.optim.loss == "kl" else None


def real_states(config: Config, count: int) -> torch.Tensor:
    """[count, d] real states of the train split; repeated, but shuffled, where it has fewer."""
    found = reader(config, "train")
    states = found.packed(range(len(found))).states[LAST]
    generator = torch.Generator().manual_seed(0)
    parts = [states[torch.randperm(len(states), generator=generator)] for _ in range(-(-count // len(states)))]
    return torch.cat([states, *parts])[:count]


def parts_of(order: Sequence[int], size: int) -> list[Sequence[int]]:
    """An order of sequences, cut into batches."""
    return [order[start : start + size] for start in range(0, len(order), size)]


def seconds(work: Callable[[], object]) -> float:
    """Wall clock of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    text = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    for row in [text[0], ["-" * width for width in widths], *text[1:]]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |", flush=True)


def machine() -> str:
    """What this ran on."""
    name = lineage.cpu_name()
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}; {name}"
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median (lowest to highest)."""
    median, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"

"""Which choices make better heads? `python -m bench.quality [NAME ...]`, after `make repro`.

Exact-walk tokens per step on val, and on eval for the winner, after the same number of positions for the public
recipe and each of our choices, one changed at a time (NAME: only those with such a part in their name). Takes about
40 minutes on two cores.

`python -m bench.quality curve [COUNT ...]`: each method with its best settings (bench.common.METHODS) after training on
so many answers, by default 1/8, 1/4, ... of the default's as far as there are answers: after `spec tokenize`, `respond`
and `cache` with `-S data.max_samples=1536 -S model.speculator.method=eagle3` up to 4 times as many. Draws
docs/data_size.png. eagle3 always needs the vectors that `spec cache -S model.speculator.method=eagle3` stores.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.common import METHODS, default_config, machine, reader, table, teacher_of
from spec import acceptance, plots
from spec.config import Config
from spec.drafting import Sources
from spec.store import tables as base_tables
from spec.store.reader import FeatureReader
from spec.training import loop
from spec.training.frozen import FrozenTask
from spec.training.resume import Checkpoints
from spec.training.start import initialise, shape_on
from spec.workers import this_worker

CHOICES: dict[str, Sequence[str]] = {
    "params.yaml": (),
    "public recipe (ce, random init, all tokens, lr 0.001, decay 0.1)": (
        *("optim.loss=ce", "model.speculator.init=random", "model.speculator.draft_vocab_size=null"),
        *("optim.lr=0.001", "optim.weight_decay=0.1"),
    ),
    "init random": ("model.speculator.init=random",),
    "loss ce": ("optim.loss=ce",),
    "lr 1e-3": ("optim.lr=0.001",),
    "lr 4e-3": ("optim.lr=0.004",),
    "weight decay 0.1": ("optim.weight_decay=0.1",),
    "scale_input": ("model.speculator.scale_input=true",),
    "eagle3": METHODS["eagle3"],
    "sum_lstm": ("model.speculator.method=sum_lstm", "model.speculator.tie_lstm_embs=true"),
    "draft vocabulary 4,096": ("model.speculator.draft_vocab_size=4096",),
    "draft vocabulary 16,384": ("model.speculator.draft_vocab_size=16384",),
    "whole vocabulary": ("model.speculator.draft_vocab_size=null",),
    "batch of 4": ("data.train_batch_size=4",),
    "batch of 16": ("data.train_batch_size=16",),
    "head weights 3:2:1": ("optim.head_weights=[3, 2, 1]",),
}


def main() -> None:
    wanted = sys.argv[1:]
    print(machine())
    if wanted[:1] == ["curve"]:
        curve([int(count) for count in wanted[1:]])
        return
    rows = []
    for name, overrides in CHOICES.items():
        if wanted and not any(part in name for part in wanted):
            continue
        val, held, seconds, step = train(default_config(*overrides))
        rows.append([name, f"{val:.3f}", f"{held:.3f}", step, f"{seconds:.0f} s"])
        print(f"{name}: {val:.3f} on val, {held:.3f} on eval, best at step {step}, {seconds:.0f} s", flush=True)
    table(["choice", "tokens per step, val", "eval", "best step", "training"], rows)


def curve(counts: Sequence[int]) -> None:
    whole, available = default_config().data.max_samples or 384, len(reader(default_config(), "train"))
    counts = counts or [round(whole * share) for share in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)]
    counts = [count for count in counts if count <= available]
    found: dict[str, list[float]] = {f"{method}, {split}": [] for method in METHODS for split in ("val", "eval")}
    for method, overrides in METHODS.items():
        for count in counts:
            val, held, seconds, _ = train(default_config(*overrides), count)
            found[f"{method}, val"].append(val)
            found[f"{method}, eval"].append(held)
            print(f"{method}, {count} answers: {val:.3f} on val, {held:.3f} on eval, {seconds:.0f} s", flush=True)
    lines = {name: (counts, rates) for name, rates in found.items()}
    plots.curves(Path("docs/data_size.png"), lines, "answers to train on", "tokens per step, head alone")
    table(
        ["answers", *found],
        [[count, *(f"{rates[i]:.3f}" for rates in found.values())] for i, count in enumerate(counts)],
    )


def train(config: Config, count: int | None = None) -> tuple[float, float, float, int]:
    """Train over the first sequences; returns tokens per step on val and eval, seconds, and the best step."""
    worker = this_worker()
    found = {split: reader(config, split) for split in ("train", "val", "eval")}
    found["train"] = first(found["train"], count or config.data.max_samples or len(found["train"]))
    shape = shape_on(config.model.speculator, found["train"].manifest)
    tables = base_tables.Tables(found["train"].tables)
    speculator = initialise(config, shape, found["train"].token_counts(), tables)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=".") as folder:
        task = FrozenTask(config, speculator, found["train"], found["val"], worker, teacher_of(config, tables))
        began = time.monotonic()
        result = loop.run(task, Checkpoints(Path(folder), ""))
        seconds = time.monotonic() - began
    task.restore(result.weights)
    rates, sources = [], Sources(config.decode, "head", speculator.config)
    for split in ("val", "eval"):
        with torch.autocast(worker.device.type, dtype=torch.bfloat16, enabled=worker.mixed("bfloat16")):
            answers = acceptance.draft_answers(speculator, found[split], sources=sources)
        rates.append(acceptance.tokens_per_step(acceptance.walks(found[split], answers)))
    return rates[0], rates[1], seconds, result.step


def first(found: FeatureReader, count: int) -> FeatureReader:
    """A reader of the first sequences of a split."""
    manifest = found.manifest
    taps = [replace(each, segment=each.segment[:count], row=each.row[:count]) for each in manifest.taps]
    cut: dict[str, Any] = {name: getattr(manifest, name)[:count] for name in ("prompt_length", "written", "domain")}
    return FeatureReader(replace(manifest, taps=taps, **cut), found.root)


if __name__ == "__main__":
    main()

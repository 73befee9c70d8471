"""Which choices make better heads? `python -m bench.quality [NAME ...]`, after `make repro`.

Exact-walk tokens per step on val, and on eval for the winner, after the same number of positions for the public
recipe and each of our choices, one changed at a time (NAME: only those with such a part in their name). Takes about
40 minutes on two cores.

`python -m bench.quality curve`: the same for 1/8, 1/4, ... of the default's data, as far as there is data: after
`spec tokenize`, `respond` and `cache` with `-S data.max_samples=1536` up to 4 times as much. Draws docs/data_size.png.
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

from bench.common import default_config, machine, reader, table
from spec import acceptance, plots
from spec.base import Teacher
from spec.config import Config
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
    if wanted == ["curve"]:
        curve()
        return
    rows = []
    for name, overrides in CHOICES.items():
        if wanted and not any(part in name for part in wanted):
            continue
        val, held, seconds, step = train(default_config(*overrides))
        rows.append([name, f"{val:.3f}", f"{held:.3f}", step, f"{seconds:.0f} s"])
        print(f"{name}: {val:.3f} on val, {held:.3f} on eval, best at step {step}, {seconds:.0f} s", flush=True)
    table(["choice", "tokens per step, val", "eval", "best step", "training"], rows)


def curve() -> None:
    config = default_config()
    whole = config.data.max_samples or 384
    counts = [round(whole * share) for share in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)]
    available = len(reader(config, "train"))
    found: dict[int, tuple[float, float]] = {}
    for count in [count for count in counts if count <= available]:
        val, held, seconds, _ = train(config, count)
        found[count] = val, held
        print(f"{count} answers: {val:.3f} on val, {held:.3f} on eval, {seconds:.0f} s", flush=True)
    lines = {name: (list(found), [each[i] for each in found.values()]) for i, name in enumerate(("val", "eval"))}
    plots.curves(Path("docs/data_size.png"), lines, "answers to train on", "tokens per step, head alone")
    table(["answers", "val", "eval"], [[count, f"{val:.3f}", f"{held:.3f}"] for count, (val, held) in found.items()])


def train(config: Config, count: int | None = None) -> tuple[float, float, float, int]:
    """Train over the first sequences; returns tokens per step on val and eval, seconds, and the best step."""
    worker = this_worker()
    found = {split: reader(config, split) for split in ("train", "val", "eval")}
    found["train"] = first(found["train"], count or config.data.max_samples or len(found["train"]))
    shape = shape_on(config.model.speculator, found["train"].manifest)
    tables = base_tables.Tables(found["train"].tables)
    speculator = initialise(config, shape, found["train"].token_counts(), tables)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=".") as folder:
        task = FrozenTask(config, speculator, found["train"], found["val"], worker, Teacher(tables["lm_head"]))
        began = time.monotonic()
        result = loop.run(task, Checkpoints(Path(folder), ""))
        seconds = time.monotonic() - began
    task.restore(result.weights)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=worker.mixed("bfloat16")):
        answers = acceptance.draft_answers(speculator, found["eval"])
    walks = acceptance.walks(found["eval"], answers)
    return result.val["tokens_per_step"], acceptance.tokens_per_step(walks), seconds, result.step


def first(found: FeatureReader, count: int) -> FeatureReader:
    """A reader of the first sequences of a split."""
    manifest = found.manifest
    taps = [replace(each, segment=each.segment[:count], row=each.row[:count]) for each in manifest.taps]
    cut: dict[str, Any] = {name: getattr(manifest, name)[:count] for name in ("prompt_length", "written", "domain")}
    return FeatureReader(replace(manifest, taps=taps, **cut), found.root)


if __name__ == "__main__":
    main()

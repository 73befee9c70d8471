"""Heads for a base of 8B: from a store of random states, compared with the public recipe; and the reader alone."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench import recipes
from bench.common import parts_of, seconds
from bench.gpu.base import random_heads, speculator_section
from bench.gpu.check import Check
from bench.loader import store
from spec import config as config_module
from spec import costs
from spec.config import Config
from spec.heads import LAST, Speculator, Tap
from spec.store.codecs import CODECS
from spec.store.manifest import Manifest
from spec.store.reader import FeatureReader, prefetch
from spec.training import loop, loss
from spec.training.frozen import FrozenTask
from spec.training.loop import LOG_EVERY, Progress
from spec.training.resume import Checkpoints
from spec.workers import Worker


def run(check: Check) -> None:
    """Train in every form, then read."""
    sizes = check.sizes
    card = costs.measure(check.device, torch.bfloat16)
    splits = stores(check)
    reader = FeatureReader(splits["zstd"], check.work / "zstd")
    for name, outputs in (("whole vocabulary", sizes.vocabulary), ("draft vocabulary", sizes.drafted)):
        setting = Setting(check, settings(check, outputs), random_heads(sizes, outputs, check.device), reader)
        compare(setting, name, card, expected=outputs == sizes.vocabulary)
        in_the_loop(setting, name)
        if outputs == sizes.vocabulary:
            chunks(setting)
    for codec, split in splits.items():
        read(check, codec, split)
    compiled(setting)


def settings(check: Check, outputs: int, method: str = "sum_rnn") -> Config:
    """Parameters of heads as wide as the base, with this many outputs."""
    sizes = check.sizes
    return config_module.from_mapping(
        {
            "data": {"train_batch_size": sizes.batch, "micro_batch_size_per_gpu": sizes.batch},
            "model": {"speculator": speculator_section(sizes, outputs, method)},
            "optim": {"lr": 1e-3},
            "trainer": {"logger": "console", "total_epochs": 100, "test_freq": 10**9, "save_freq": 10**9},
        }
    )


def stores(check: Check) -> dict[str, Manifest]:
    """Random states of answers, in a store for each codec."""
    return {codec: random_store(check, check.work / codec, [LAST], check.sizes.trained, codec) for codec in CODECS}


def random_store(check: Check, folder: Path, taps: Sequence[Tap], count: int, codec: str) -> Manifest:
    """`count` sequences of random vectors, and of tokens of the draft vocabulary whose second half is supervised."""
    sizes = check.sizes
    answer = sizes.length - sizes.length // 2
    torch.manual_seed(0)
    states = {}
    for tap in taps:
        shape = (count * (sizes.length if tap.positions == "all" else answer), sizes.hidden)
        states[tap] = torch.randn(shape, device=check.device, dtype=torch.bfloat16).cpu()
    ids = np.random.default_rng(0).integers(0, sizes.drafted, (count, sizes.length), np.int32)
    mask = np.zeros(sizes.length, np.uint8)
    mask[-answer:] = 1
    return store(folder, states, ids, mask, sizes.vocabulary, codec, sizes.segment)


@dataclass(frozen=True)
class Setting:
    """What is trained on what; every form begins with a copy of the untrained speculator."""

    check: Check
    config: Config
    speculator: Speculator
    reader: FeatureReader

    @property
    def worker(self) -> Worker:
        """This process."""
        return Worker(0, 1, self.check.device)

    def recipe(self, make: Callable[..., recipes.Recipe], **options: Any) -> recipes.Recipe:
        """One of bench.recipes, ready for the first steps."""
        epoch = parts_of(self.reader.order(0, 0), self.check.sizes.batch)
        parts = list(itertools.islice(itertools.cycle(epoch), self.check.sizes.steps))
        return make(self.config, copy.deepcopy(self.speculator), self.reader, parts, self.worker, **options)

    def measure(self, make: Callable[..., recipes.Recipe], **options: Any) -> recipes.Measured:
        """A few steps; nothing of them is left on the device."""
        check = self.check
        found = recipes.measure(self.recipe(make, **options), check.device, check.sizes.steps, check.sizes.warmup)
        empty(check.device)
        return found


def empty(device: torch.device) -> None:
    """Give memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compare(
    setting: Setting,
    name: str,
    card: costs.Machine,
    expected: bool,
    recipe: Callable[..., recipes.Recipe] = recipes.public,
    **options: Any,
) -> None:
    """Ours and the public recipe on the same batches; options are those of both."""
    figure = setting.check.figure
    ours, public = setting.measure(recipes.ours, **options), setting.measure(recipe, **options)
    operations = 6 * setting.speculator.operations(setting.speculator.config)  # forward and backward
    share = operations * ours.rate / card.flops
    figure(f"{name}: ours, positions/s", f"{ours.rate:,.0f}")
    figure(f"{name}: public recipe, positions/s", f"{public.rate:,.0f}")
    figure(f"{name}: ours / public recipe", f"{ours.rate / public.rate:.2f}", "at least 1.5" if expected else "")
    figure(f"{name}: ours, share of the card's bf16 rate", f"{share:.3f}", "at least 0.40" if expected else "")
    figure(f"{name}: ours, GB above static", f"{ours.memory / 1e9:.2f}")
    figure(f"{name}: public recipe, GB above static", f"{public.memory / 1e9:.2f}")
    memory = f"{ours.memory / max(public.memory, 1):.2f}"
    figure(f"{name}: memory, ours / public recipe", memory, "at most 0.50" if expected else "")
    losses = f"{ours.losses[-1]:.4f}, {public.losses[-1]:.4f}"
    figure(f"{name}: loss at the last step, ours and public recipe", losses, "equal but for rounding")


class _EnoughError(Exception):
    """Ends a run of the loop."""


def in_the_loop(setting: Setting, name: str) -> None:
    """The project's own loop: as fast as the steps alone, if reading and logging delay nothing."""
    check = setting.check
    told: list[dict[str, float]] = []

    def listen(progress: Progress) -> None:
        told.append(progress.metrics)
        if len(told) == 2:  # the first steps are not typical
            raise _EnoughError

    speculator = copy.deepcopy(setting.speculator)
    task = FrozenTask(setting.config, speculator, setting.reader, setting.reader, setting.worker)
    with contextlib.suppress(_EnoughError):
        loop.run(task, Checkpoints(check.work / "checkpoints", ""), listen)
    if len(told) < 2:
        raise RuntimeError(f"the data last for less than {2 * LOG_EVERY} steps")
    del task, speculator
    empty(check.device)
    check.figure(f"{name}: the loop, positions/s", f"{told[1]['positions_per_second']:,.0f}")
    check.figure(f"{name}: the loop, share of time waiting for data", f"{told[1]['data_wait']:.3f}")


def chunks(setting: Setting) -> None:
    """Other numbers of logits that a chunk of the loss may hold, and a profile."""
    check = setting.check
    for power in (26, 28, 30):
        with mock.patch.dict(loss.CHUNK_LOGITS, {check.device.type: 2**power}):
            found = setting.measure(recipes.ours)
        value = f"{found.rate:,.0f}; {found.memory / 1e9:.2f}"
        check.figure(f"chunks of 2^{power} logits: positions/s; GB above static", value)
    recipe = setting.recipe(recipes.ours)
    for number in (0, 1):  # the first steps allocate
        recipe.step(number)
    check.profile("one training step", recipe.step, 2)
    empty(check.device)


def compiled(setting: Setting) -> None:
    """torch.compile, with the draft vocabulary: it is tried, and not relied upon."""
    backend = "inductor" if setting.check.device.type == "cuda" else "eager"  # a dry run needs no compiler
    try:
        value = f"{setting.measure(recipes.ours, prepare=partial(torch.compile, backend=backend)).rate:,.0f}"
    except Exception as error:
        value = f"failed: {error!r:.200}"
    setting.check.figure("draft vocabulary: ours with torch.compile, positions/s", value)


def read(check: Check, codec: str, split: Manifest) -> None:
    """How fast positions come into pinned memory."""
    reader, pin = FeatureReader(split, check.work / codec), check.device.type == "cuda"

    def epoch(number: int) -> int:
        parts = parts_of(reader.order(0, number), check.sizes.batch)
        return sum(len(batch.starts) for batch in prefetch(reader.batches(parts, pin)))

    first, *later = [split.positions / seconds(partial(epoch, number)) for number in range(4)]
    name, value = (
        f"reader, {codec}, positions/s: first epoch; later ones",
        f"{first:,.0f}; {statistics.median(later):,.0f}",
    )
    check.figure(name, value, "more than training takes")

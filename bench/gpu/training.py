"""Heads for a base of 8B: from a store of random states, compared with the public recipe; and the reader alone."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from bench import recipes
from bench.common import seconds
from bench.gpu.base import random_heads
from bench.gpu.check import Check
from bench.gpu.figures import CHUNKS, CODECS, RECIPES
from bench.loader import store
from bench.recipes import Measured, Recipe
from spec import config as config_module
from spec import costs
from spec.config import Config
from spec.heads import Speculator
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
    states, ids, mask = data(check)
    splits = {
        codec: store(check.work / codec, states, ids, mask, sizes.vocabulary, codec, sizes.segment) for codec in CODECS
    }
    for name, outputs in zip(RECIPES, (sizes.vocabulary, sizes.drafted), strict=True):
        speculator = random_heads(sizes, outputs, check.device)
        reader = FeatureReader(splits["zstd"], check.work / "zstd")
        setting = Setting(check, settings(check, outputs), speculator, reader)
        compare(setting, name, card)
        in_the_loop(setting, name)
        if name == RECIPES[0]:
            chunks(setting)
    for codec, split in splits.items():
        read(check, codec, split)
    compiled(setting)


def settings(check: Check, outputs: int) -> Config:
    """Parameters of heads as wide as the base, with this many outputs."""
    sizes = check.sizes
    widths = dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), sizes.hidden)
    drafted = outputs if outputs < sizes.vocabulary else None
    return config_module.from_mapping(
        {
            "data": {"train_batch_size": sizes.batch, "micro_batch_size_per_gpu": sizes.batch},
            "model": {"speculator": {"n_predict": sizes.n_predict, "draft_vocab_size": drafted, **widths}},
            "optim": {"lr": 1e-3},
            "trainer": {"logger": "console", "total_epochs": 100, "test_freq": 10**9, "save_freq": 10**9},
        }
    )


def data(check: Check) -> tuple[torch.Tensor, NDArray[np.int32], NDArray[np.uint8]]:
    """Random states, tokens of the draft vocabulary, and a mask whose second half is supervised."""
    sizes = check.sizes
    answer = sizes.length - sizes.length // 2
    torch.manual_seed(0)
    states = torch.randn(sizes.trained * answer, sizes.hidden, device=check.device, dtype=torch.bfloat16).cpu()
    ids = np.random.default_rng(0).integers(0, sizes.drafted, (sizes.trained, sizes.length), np.int32)
    mask = np.zeros(sizes.length, np.uint8)
    mask[-answer:] = 1
    return states, ids, mask


@dataclass(frozen=True)
class Setting:
    """What is trained on what.

    Attributes:
        check: sizes and device.
        config: of the run.
        speculator: untrained; every form begins with a copy of it.
        reader: of the store.
    """

    check: Check
    config: Config
    speculator: Speculator
    reader: FeatureReader

    @property
    def worker(self) -> Worker:
        """This process."""
        return Worker(0, 1, self.check.device)

    def fresh(self) -> Speculator:
        """A copy of the untrained speculator."""
        return copy.deepcopy(self.speculator)

    def recipe(self, form: str, prepare: Callable[[Any], Any] = lambda module: module) -> Recipe:
        """`ours` or `public`, ready for the first steps of an epoch."""
        order, batch = self.reader.order(0, 0), self.check.sizes.batch
        parts = [order[start : start + batch] for start in range(0, self.check.sizes.steps * batch, batch)]
        if form == "ours":
            return recipes.ours(self.config, self.fresh(), self.reader, parts, self.worker, prepare=prepare)
        return recipes.public(self.config, self.fresh(), self.reader, parts, self.worker)

    def measure(self, form: str, prepare: Callable[[Any], Any] = lambda module: module) -> Measured:
        """A few steps; nothing of them is left on the device."""
        sizes = self.check.sizes
        found = recipes.measure(self.recipe(form, prepare), self.check.device, sizes.steps, sizes.warmup)
        empty(self.check.device)
        return found


def empty(device: torch.device) -> None:
    """Give memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compare(setting: Setting, name: str, card: costs.Machine) -> None:
    """Ours and the public recipe on the same batches."""
    check = setting.check
    found = {form: setting.measure(form) for form in ("ours", "public")}
    ours, public = found["ours"], found["public"]
    check.figure(f"{name}: ours, positions/s", f"{ours.rate:,.0f}")
    check.figure(f"{name}: public recipe, positions/s", f"{public.rate:,.0f}")
    check.figure(f"{name}: ours / public recipe", f"{ours.rate / public.rate:.2f}")
    operations = 6 * setting.speculator.operations(setting.speculator.config)  # forward and backward
    check.figure(f"{name}: ours, share of the card's bf16 rate", f"{operations * ours.rate / card.flops:.3f}")
    check.figure(f"{name}: ours, GB above static", f"{ours.memory / 1e9:.2f}")
    check.figure(f"{name}: public recipe, GB above static", f"{public.memory / 1e9:.2f}")
    check.figure(f"{name}: memory, ours / public recipe", f"{ours.memory / max(public.memory, 1):.2f}")
    check.figure(
        f"{name}: loss at the last step, ours and public recipe", f"{ours.losses[-1]:.4f}, {public.losses[-1]:.4f}"
    )


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

    checkpoints = Checkpoints(check.work / "checkpoints", "")
    task = FrozenTask(setting.config, setting.fresh(), setting.reader, setting.reader, setting.worker)
    try:
        loop.run(task, checkpoints, listen)
    except _EnoughError:
        pass
    else:
        raise RuntimeError(f"the data last for less than {2 * LOG_EVERY} steps")
    del task
    empty(check.device)
    check.figure(f"{name}: the loop, positions/s", f"{told[1]['positions_per_second']:,.0f}")
    check.figure(f"{name}: the loop, share of time waiting for data", f"{told[1]['data_wait']:.3f}")


def chunks(setting: Setting) -> None:
    """Other sizes of the loss's chunks, and a profile."""
    check = setting.check
    for power in CHUNKS:
        with mock.patch.dict(loss.CHUNK_LOGITS, {check.device.type: 2**power}):
            found = setting.measure("ours")
        check.figure(
            f"chunks of 2^{power} logits: positions/s; GB above static", f"{found.rate:,.0f}; {found.memory / 1e9:.2f}"
        )
    recipe = setting.recipe("ours")
    for number in (0, 1):  # the first steps allocate
        recipe.step(number)
    check.profile("one training step", recipe.step, 2)
    empty(check.device)


def compiled(setting: Setting) -> None:
    """torch.compile, with the draft vocabulary: it is tried, and not relied upon."""
    backend = "inductor" if setting.check.device.type == "cuda" else "eager"  # a dry run needs no compiler
    try:
        found = setting.measure("ours", lambda module: torch.compile(module, backend=backend))
        value = f"{found.rate:,.0f}"
    except Exception as error:
        value = f"failed: {error!r:.200}"
    setting.check.figure("draft vocabulary: ours with torch.compile, positions/s", value)


def read(check: Check, codec: str, split: Manifest) -> None:
    """How fast positions come into pinned memory."""
    sizes, pin = check.sizes, check.device.type == "cuda"
    reader = FeatureReader(split, check.work / codec)

    def epoch(number: int) -> int:
        order = reader.order(0, number)
        parts = [order[start : start + sizes.batch] for start in range(0, len(order), sizes.batch)]
        return sum(len(batch.starts) for batch in prefetch(reader.batches(parts, pin)))

    first, *later = [split.positions / seconds(partial(epoch, number)) for number in range(4)]
    check.figure(
        f"reader, {codec}, positions/s: first epoch; later ones", f"{first:,.0f}; {statistics.median(later):,.0f}"
    )

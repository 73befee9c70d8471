"""eagle3: training for a base of 8B from a store of random vectors, compared with the public recipe; then the embedded
default with it, from cache to evaluate."""

from __future__ import annotations

import os
from functools import partial

import torch

from bench import decode, public_eagle3
from bench.common import METHODS
from bench.gpu import base, default, training
from bench.gpu.check import Check
from spec import costs
from spec.base import Teacher
from spec.store.reader import FeatureReader


def run(check: Check) -> None:
    """Train, then decode."""
    train(check)
    # After the sections before it, only what the method changes is done again.
    answered = default.workspace(check).exists()
    default.run_stages(check, default.STAGES[3:] if answered else default.STAGES, *METHODS["eagle3"])
    os.chdir(default.workspace(check))
    prompts = [prompt for _, prompt in decode.prompts(1)[:2]]
    base.decoding(check, decode.model(), "embedded base", prompts, check.sizes.written, expected="")


def train(check: Check) -> None:
    """Over the draft vocabulary, by the base's distributions; the public recipe has extra columns for the depths."""
    sizes, device = check.sizes, check.device
    card = costs.measure(device, torch.bfloat16)
    speculator = base.random_heads(sizes, sizes.drafted, device, "eagle3")
    folder = check.work / "eagle3"
    manifest = training.random_store(check, folder, speculator.taps[::-1], sizes.read, "none")  # LAST first
    config = training.settings(check, sizes.drafted, "eagle3")
    setting = training.Setting(check, config, speculator, FeatureReader(manifest, folder))
    shape = (sizes.vocabulary, sizes.hidden)
    teacher = Teacher(torch.randn(shape, device=device, dtype=torch.bfloat16) * sizes.hidden**-0.5)
    recipe = partial(public_eagle3.recipe, dense=False)
    training.compare(setting, "draft vocabulary", card, True, recipe, teacher=teacher)

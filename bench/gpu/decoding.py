"""Decoding with the embedded base and the heads that the section `default` has trained."""

from __future__ import annotations

import os

from bench import decode
from bench.gpu import base, default
from bench.gpu.check import Check


def run(check: Check) -> None:
    """Where a step's time goes, and a profile of one step."""
    os.chdir(default.workspace(check))
    lm = decode.model()
    prompts = [prompt for _, prompt in decode.prompts(1)[:2]]
    base.decoding(check, lm, "embedded base", prompts, check.sizes.written)
    stream = lm.stream(prompts[0], 8, draft="hybrid")
    next(stream)  # the prefill
    check.profile("one decoding step of the embedded base, hybrid", next, stream)

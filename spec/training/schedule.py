"""Learning rate by step."""

from __future__ import annotations

import math

from spec.config import Optim


def factor(params: Optim, step: int, total: int) -> float:
    """What the learning rate is multiplied by at `step` (from 0) of `total`.

    A linear warm-up over warmup_ratio of the steps, then by params.schedule: `cosine` down to 0, `constant`, or
    `wsd` (constant, then linear to 0 over the last fifth; Hu et al. 2024, MiniCPM).
    """
    warmup = round(params.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    if params.schedule == "constant":
        return 1.0
    if params.schedule == "wsd":
        return min(1.0, (total - step) / max(0.2 * total, 1))
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))

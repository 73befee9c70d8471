"""How likely the base is to accept a token that sources of drafts propose: one logistic model for all of them.

Each source says how sure it is of its token: the heads by a probability, n-grams by the length of their match and by
how often this token followed it. `fit` turns this into chances, on answers that the
sources have not seen.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Signal = tuple[int, tuple[float, ...]]
"""The token that a source proposes, and how sure the source is of it."""

SIGNALS = (2, 3, 1)
"""How many numbers say how sure each source is: n-grams of the sequence, n-grams of answers, heads."""

FEATURES = 1 + sum(2 * (1 + count) for count in SIGNALS)

PRIOR = 1.0
"""Weight of the penalty on squared differences, which keeps a fit on few answers modest."""

Weights = tuple[float, ...]
"""FEATURES numbers."""


def log_odds(p: float) -> float:
    """The log odds of a probability, which is clipped to 0.0001 .. 0.9999."""
    p = min(max(p, 1e-4), 1 - 1e-4)
    return math.log(p / (1 - p))


def share(count: int, total: int) -> float:
    """The log odds of a share, which few observations keep near even."""
    return math.log((count + 0.5) / (total - count + 0.5))


def features(token: int, signals: Sequence[Signal | None]) -> list[float]:
    """What the model reads of a token: a constant; then for each source whether it proposes this token, and how sure
    it is, and the same for another token instead; zeros for a source that proposes nothing. FEATURES numbers."""
    found = [1.0]
    for signal, count in zip(signals, SIGNALS, strict=True):
        absent = [0.0] * (1 + count)
        if signal is None:
            found += absent + absent
        else:
            said = [1.0, *signal[1]]
            found += said + absent if signal[0] == token else absent + said
    return found


def chances(weights: Weights, signals: Sequence[Signal | None]) -> dict[int, float]:
    """The probability that the base accepts each of the proposed tokens: the sigmoid of weights times features."""
    rest, gains, place = weights[0], dict[int, float](), 1
    for signal, count in zip(signals, SIGNALS, strict=True):
        if signal is not None:
            own, other = (
                weights[start] + sum(map(operator.mul, weights[start + 1 : start + 1 + count], signal[1]))
                for start in (place, place + 1 + count)
            )
            rest += other
            gains[signal[0]] = gains.get(signal[0], 0.0) + own - other
        place += 2 * (1 + count)
    return {token: 1 / (1 + math.exp(-min(max(rest + gain, -30.0), 30.0))) for token, gain in gains.items()}


def fit(rows: NDArray[np.float64], accepted: NDArray[np.bool_], start: Weights) -> Weights:
    """The weights under which the tokens with these features [N, FEATURES] were accepted: logistic regression by
    Newton's method, with a ridge penalty on what they differ from `start`. So a source that never speaks keeps those.
    """
    first, ridge = np.array(start), PRIOR * np.eye(FEATURES)
    weights = first.copy()
    for _ in range(30):
        p = 1 / (1 + np.exp(-np.clip(rows @ weights, -30, 30)))
        slope = rows.T @ (p - accepted) + ridge @ (weights - first)
        step = np.linalg.solve(rows.T @ (rows * (p * (1 - p))[:, None]) + ridge, slope)
        weights -= step
        if np.abs(step).max() < 1e-6:
            break
    return tuple(round(float(w), 4) for w in weights)

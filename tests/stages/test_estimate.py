"""The estimate of all answers' tokens is right within a factor of two after the first tenth of them."""

from typing import Any

import numpy as np
import pytest

from stages.common import Estimated

BATCHES = (128, 53, 128, 89, 79, 3)


@pytest.mark.parametrize("limit", [40, 128, 512])
@pytest.mark.parametrize("by_step", [True, False])
def test_the_estimate_of_tokens(limit: int, by_step: bool) -> None:
    random = np.random.default_rng(0)
    drawn = [np.minimum(limit, random.geometric(1 / 80, size)) for size in BATCHES]
    lengths = iter(drawn)
    seen: list[tuple[int, float]] = [(0, 0.0)]

    def answer(*asked: Any) -> list[list[int]]:
        batch, tell = next(lengths), asked[-1]
        for step in range(max(batch)):
            for count in [(batch > step).sum()] if by_step else [1] * (batch > step).sum():
                tell(int(count))
        return [[0] * length for length in batch]

    def advance(count: int, total: float) -> None:
        seen.append((seen[-1][0] + count, total))

    estimated = Estimated(answer, sum(BATCHES), advance)
    for size in BATCHES:
        estimated([[1]] * size, limit, 0.0, [], print)
    written = seen[-1][0]
    # An engine that batches by itself says nothing of its first batch before that has ended.
    assert seen[-1][1] == written
    begun = written * 0.1 if by_step else sum(drawn[0])
    ratios = [total / written for done, total in seen if done > begun]
    assert 0.5 < min(ratios) <= max(ratios) < 2

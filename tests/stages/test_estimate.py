"""The estimate of all answers' tokens is right within a factor of two after the first batch of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from stages.common import estimated

BATCHES = (128, 53, 128, 89, 79, 3)


@pytest.mark.parametrize("limit", [40, 128, 512])
def test_the_estimate_of_tokens(limit: int) -> None:
    random = np.random.default_rng(0)
    drawn = [np.minimum(limit, random.geometric(1 / 80, size)) for size in BATCHES]
    lengths = iter(drawn)
    seen: list[tuple[int, float]] = [(0, 0.0)]

    def answer(
        prompts: Sequence[Sequence[int]], _: int, __: float, ___: Sequence[int], tell: Callable[[int], object]
    ) -> list[list[int]]:
        batch = next(lengths)
        for step in range(max(batch)):
            tell(int((batch > step).sum()))
        return [[0] * length for length in batch]

    def advance(count: int, total: float) -> None:
        seen.append((seen[-1][0] + count, total))

    write = estimated(answer, sum(BATCHES), advance)
    for size in BATCHES:
        write([[1]] * size, limit, 0.0, [], print)
    written = seen[-1][0]
    assert seen[-1][1] == written
    ratios = [total / written for done, total in seen if done > sum(drawn[0])]
    assert 0.5 < min(ratios) <= max(ratios) < 2

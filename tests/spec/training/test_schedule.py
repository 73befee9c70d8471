"""The learning rate at every step."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec.config import Optim
from spec.training.schedule import factor

schedules = st.sampled_from(["cosine", "constant", "wsd"])


def rates(total: int, **params: Any) -> list[float]:
    return [factor(Optim(**params), step, total) for step in range(total)]


@given(schedule=schedules, total=st.integers(1, 300), ratio=st.floats(0, 1))
def test_every_step_learns_and_none_more_than_the_rate(schedule: Any, total: int, ratio: float) -> None:
    found = rates(total, schedule=schedule, warmup_ratio=ratio)
    assert all(0 < rate <= 1 for rate in found)
    warmup = round(ratio * total)
    assert found[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


@pytest.mark.parametrize(
    ("schedule", "ends"),
    [
        ("cosine", [0.5 + 0.5 * math.cos(math.pi * step / 100) for step in range(101)]),
        ("constant", [1.0] * 101),
        ("wsd", [1.0] * 80 + [1 - step / 20 for step in range(21)]),
    ],
)
def test_what_follows_the_warm_up(schedule: Any, ends: list[float]) -> None:
    found = [factor(Optim(schedule=schedule, warmup_ratio=0.0), step, 100) for step in range(101)]
    assert found == pytest.approx(ends)

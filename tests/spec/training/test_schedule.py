"""The learning rate at every step."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec.config import Optim
from spec.training.schedule import factor


def rates(total: int, **params: Any) -> list[float]:
    return [factor(Optim(**params), step, total) for step in range(total)]


schedules = st.sampled_from(["cosine", "constant", "wsd"])


@given(schedule=schedules, total=st.integers(1, 300), ratio=st.floats(0, 1))
def test_every_step_learns_and_none_more_than_the_rate(schedule: Any, total: int, ratio: float) -> None:
    found = rates(total, schedule=schedule, warmup_ratio=ratio)
    assert all(0 < rate <= 1 for rate in found)
    warmup = round(ratio * total)
    assert found[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_warm_up_ends_at_the_full_rate(schedule: Any) -> None:
    found = rates(100, schedule=schedule, warmup_ratio=0.1)
    assert found[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert found[10] == 1.0


def test_cosine_comes_down_to_zero() -> None:
    found = rates(100, schedule="cosine", warmup_ratio=0.0)
    assert found[0] == 1.0
    assert found[50] == pytest.approx(0.5)
    assert found[25] == pytest.approx(0.5 + 0.5 * 0.5**0.5)
    assert factor(Optim(warmup_ratio=0.0), 100, 100) == pytest.approx(0.0)


def test_constant_stays() -> None:
    assert rates(50, schedule="constant", warmup_ratio=0.0) == [1.0] * 50


def test_wsd_comes_down_over_the_last_fifth() -> None:
    found = rates(100, schedule="wsd", warmup_ratio=0.0)
    assert found[:80] == [1.0] * 80
    assert found[80:] == pytest.approx([1 - step / 20 for step in range(20)])

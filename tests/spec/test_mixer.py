import math
import operator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec import mixer
from spec.mixer import FEATURES, Signal


def signal(count: int) -> st.SearchStrategy[Signal | None]:
    return st.none() | st.tuples(st.integers(0, 2), st.tuples(*[st.floats(-3, 3)] * count))


@given(st.tuples(*map(signal, mixer.SIGNALS)), st.integers(0, 2))
def test_a_source_speaks_for_its_token_or_for_another(signals: tuple[Signal | None, ...], token: int) -> None:
    found, place = mixer.features(token, signals), 1
    assert (len(found), found[0]) == (FEATURES, 1.0)
    for said, count in zip(signals, mixer.SIGNALS, strict=True):
        for proposed in (True, False):
            part = found[place : place + 1 + count]
            place += 1 + count
            speaks = said is not None and (said[0] == token) == proposed
            assert part == ([1.0, *said[1]] if speaks and said else [0.0] * (1 + count))


@given(st.tuples(*map(signal, mixer.SIGNALS)), st.lists(st.floats(-2, 2), min_size=FEATURES, max_size=FEATURES))
def test_chances_follow_from_the_features(signals: tuple[Signal | None, ...], weights: list[float]) -> None:
    proposed = {said[0] for said in signals if said is not None}
    odds = {token: sum(map(operator.mul, weights, mixer.features(token, signals))) for token in proposed}
    expected = {token: 1 / (1 + math.exp(-each)) for token, each in odds.items()}
    assert mixer.chances(tuple(weights), signals) == pytest.approx(expected)


def test_a_fit_finds_the_chances_that_labels_were_drawn_from() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 9, 20_000)
    rows = np.array([mixer.features(0, [(0, (math.log(n), 0.0)), None, None]) for n in lengths])
    true = 1 / (1 + np.exp(0.5 - 1.5 * np.log(lengths)))
    weights = mixer.fit(rows, generator.random(len(rows)) < true, (0.0,) * FEATURES)
    for n in range(1, 9):
        found = mixer.chances(weights, [(0, (math.log(n), 0.0)), None, None])
        assert found[0] == pytest.approx(1 / (1 + math.exp(0.5 - 1.5 * math.log(n))), abs=0.03)
    assert not any(weights[7:]), "sources that never spoke have no weight"


def test_where_little_is_seen_the_weights_stay_where_they_were() -> None:
    start = tuple(np.round(np.linspace(-2, 2, FEATURES), 4).tolist())
    assert mixer.fit(np.zeros((0, FEATURES)), np.zeros(0, np.bool_), start) == start
    once = mixer.fit(np.eye(FEATURES)[:1], np.ones(1, np.bool_), start)
    assert start[0] < once[0] < start[0] + 1
    assert once[1:] == start[1:]

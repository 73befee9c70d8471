"""The mixer's weights, fitted on a reader's answers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spec import lookup, mixer
from spec.config import Decode
from spec.heads import Choose, Packed
from spec.store.reader import FeatureReader
from spec.training import mixing
from tests.spec.heads.reference import config
from tests.tiny import sequence, store_features

V, D, N = 40, 8, 3


def foreseeing(wrong: int) -> Any:
    """Heads that draft the answers' own tokens with probability 0.9, or with `wrong` others."""

    def draft_along(packed: Packed, rows: Tensor, n: int, choose: Choose) -> None:
        ids = torch.cat([packed.ids, torch.zeros(n + 2, dtype=torch.int64)])
        read = packed.ids[packed.starts[rows] + 1]
        for k in range(n):
            assert torch.equal(read, ids[packed.starts[rows] + 1 + k]) or wrong
            likeliest = (ids[packed.starts[rows] + 2 + k] + wrong) % V
            chosen = choose(likeliest, torch.full(likeliest.shape, 0.9))
            assert chosen is not None
            read = chosen

    shape = config("sum_rnn", n_predict=N, hidden_size=D, vocab_size=V)
    return SimpleNamespace(config=shape, draft_along=draft_along, parameters=nn.Linear(1, 1).parameters)


@pytest.mark.parametrize(("wrong", "with_index"), [(0, True), (0, False), (1, True)])
def test_the_weights_say_how_often_each_source_is_right(tmp_path: Path, wrong: int, with_index: bool) -> None:
    generator = np.random.default_rng(0)
    rows = [sequence([0] + [1] * 30, [2, *generator.permutation(np.arange(3, 33)).tolist()]) for _ in range(4)]
    reader = FeatureReader(store_features(tmp_path, rows, vocab_size=V, hidden_size=D), tmp_path)
    index = None
    if with_index:  # of other answers, in which every token has another one after it
        digest = lookup.write(tmp_path / lookup.FILE, [list(range(2, 33)), list(range(3, 33))], 1.0)
        index = lookup.Lookup.open(tmp_path / lookup.FILE, digest)
    weights = mixing.fit(foreseeing(wrong), reader, Decode(ngram_min=1), index)
    assert set(weights) == {"ngram", "lookup", "hybrid"}
    signals: list[mixer.Signal | None] = [None, (7, (0.0,) * 3) if with_index else None, (5, (mixer.log_odds(0.9),))]
    head = mixer.chances(weights["hybrid"], signals)[5]
    assert head > 0.9 if wrong == 0 else head < 0.1
    if with_index:
        assert mixer.chances(weights["lookup"], [None, signals[1], None])[7] < 0.3
        assert mixer.chances(weights["hybrid"], signals)[7] < 0.3

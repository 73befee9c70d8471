"""Where training starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from spec import config as config_module
from spec import heads
from spec.training import start
from tests.spec.heads.reference import config as shape


def test_ties_of_the_draft_vocabulary_go_to_the_lower_id() -> None:
    counts = np.array([0, 5, 2, 5, 0, 2, 2, 0, 9, 0, 0, 1])
    made = start.initialise(config_module.Config(), shape(vocab_size=12, draft_vocab_size=5), counts, {})
    assert made.token_map is not None
    assert made.token_map.tolist() == [1, 2, 3, 5, 8]


@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm"])
def test_heads_start_from_the_bases_tables_where_they_are_asked_to(method: Any) -> None:
    tables = {name: torch.randn(23, 12) for name in ("embedding", "lm_head")}
    config = config_module.from_mapping({"model": {"speculator": {"init": "base"}}, "trainer": {"seed": 3}})
    made = start.initialise(config, shape(method), np.zeros(23, np.int64), tables)
    expected = heads.build(shape(method))
    expected.initialise(tables, 3)
    for name, weight in expected.state_dict().items():
        assert torch.equal(made.state_dict()[name], weight)

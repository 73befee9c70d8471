"""Where training starts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spec import config as config_module
from spec import heads
from spec.errors import SpecError
from spec.training import start
from tests.spec.export import test_vllm
from tests.spec.heads.reference import config as shape


def test_ties_of_the_draft_vocabulary_go_to_the_lower_id() -> None:
    counts = np.array([0, 5, 2, 5, 0, 2, 2, 0, 9, 0, 0, 1])
    made = start.initialise(config_module.Config(), shape(vocab_size=12, draft_vocab_size=5), counts, {})
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


def test_an_imported_head_keeps_its_own_layer(tmp_path: Path) -> None:
    """Public heads have layers and lengths of their own, and weights that fit no other."""
    head = test_vllm.checkpoint(tmp_path, test_vllm.config({"head_dim": 4, "rope_theta": 10.0}))
    tables = {"embedding": head.embed_tokens.weight.detach()}
    config = config_module.from_mapping({"model": {"speculator": {"init": str(tmp_path)}}})
    shape = test_vllm.config(n_predict=7, base_digest="d2")
    made = start.initialise(config, shape, np.zeros(23, np.int64), tables)
    assert made.config == shape.model_copy(update={"layer": head.config.layer})
    assert torch.equal(made.midlayer.self_attn.q_proj.weight, head.midlayer.self_attn.q_proj.weight)
    with pytest.raises(SpecError, match=r"reads the layers \[.*\], and the parameters ask for \[3\]"):
        start.initialise(config, test_vllm.config(aux_layers=[3]), np.zeros(23, np.int64), tables)
    same = test_vllm.config(aux_layers=[tap.layer for tap in head.taps[:-1]])  # by number instead of by default
    assert start.initialise(config, same, np.zeros(23, np.int64), tables).taps == head.taps

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec.heads import SpeculatorConfig

from .reference import config

widths = st.lists(st.integers(1, 4096), min_size=1, max_size=3).map(tuple)


@given(
    inner=widths,
    emb=widths,
    proj=widths,
    w=st.integers(1, 99),
    scale=st.booleans(),
    size=st.none() | st.integers(1, 23),
)
def test_json_round_trip(inner: Any, emb: Any, proj: Any, w: int, scale: bool, size: int | None) -> None:
    c = config(inner_dim=inner, emb_dim=(*emb, w), proj_dim=(*proj, w), scale_input=scale, draft_vocab_size=size)
    assert SpeculatorConfig.from_json(json.loads(json.dumps(c.to_json()))) == c


@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm"])
def test_what_other_readers_expect(method: str) -> None:
    written = config(method, inner_dim=(4, 8)).to_json()
    assert isinstance(written["architectures"], list)
    assert len(written["architectures"]) == 1
    assert isinstance(written["model_type"], str)
    assert written["num_attention_heads"] == 1
    assert written["inner_dim"] == "4.8"
    assert written["emb_dim"] == 8


def test_keys_of_other_tools_are_passed_over() -> None:
    c = config()
    written = c.to_json() | {"torch_dtype": "bfloat16", "architectures": ["X"], "num_hidden_layers": 1}
    assert SpeculatorConfig.from_json(written) == c


def test_unknown_and_missing_keys_are_named() -> None:
    written = config().to_json()
    with pytest.raises(ValueError, match=r"unknown keys emb_dims:"):
        SpeculatorConfig.from_json(written | {"emb_dims": 8})
    del written["n_predict"], written["base_digest"]
    with pytest.raises(ValueError, match="missing keys base_digest, n_predict"):
        SpeculatorConfig.from_json(written)


def test_a_width_read_as_a_number_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"emb_dim: 1024\.256 "):
        SpeculatorConfig.from_json(config().to_json() | {"emb_dim": 1024.256})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emb_dim": (4, 16), "proj_dim": (4, 8)}, r"emb_dim ends in 16 and proj_dim in 8"),
        ({"method": "sum_lstm", "tie_weights": False}, r"sum_lstm .* tie_weights"),
        ({"method": "sum_gru"}, r"method is 'sum_gru', expected one of sum_rnn, sum_lstm"),
        ({"method": "medusa"}, r"method medusa is gone"),
        ({"draft_vocab_size": 24}, r"draft_vocab_size is 24 and vocab_size 23"),
        ({"draft_vocab_size": 0}, r"draft_vocab_size is 0"),
        ({"n_predict": 0}, r"n_predict is 0"),
        ({"vocab_size": True}, r"vocab_size is True"),
        ({"hidden_size": 1.5}, r"hidden_size is 1\.5"),
        ({"inner_dim": 8}, r"inner_dim is 8"),
        ({"proj_dim": ()}, r"proj_dim is \(\)"),
        ({"scale_input": 1}, r"scale_input is 1"),
        ({"base_digest": None}, r"base_digest is None"),
        ({"base_revision": 3}, r"base_revision is 3"),
    ],
)
def test_values_that_make_no_network(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)

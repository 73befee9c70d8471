import json
from typing import Any

import pytest
from hypothesis import given

from spec.heads import SpeculatorConfig, parse_config

from .reference import config
from .test_speculator import configs


@given(configs())
def test_json_round_trip(c: SpeculatorConfig) -> None:
    assert parse_config(json.loads(json.dumps(c.to_json()))) == c


def test_what_other_readers_expect() -> None:
    written = config(inner_dim=(4, 8)).to_json()
    assert [type(each) for each in written["architectures"]] == [str]
    assert isinstance(written["model_type"], str)
    assert written["num_attention_heads"] == 1
    assert (written["inner_dim"], written["emb_dim"]) == ("4.8", 8)


def test_keys_of_other_tools_are_passed_over() -> None:
    c = config()
    written = c.to_json() | {"torch_dtype": "bfloat16", "architectures": ["X"], "num_hidden_layers": 1}
    assert parse_config(written) == c


def test_missing_keys_are_named() -> None:
    written = config().to_json()
    del written["n_predict"], written["base_digest"]
    with pytest.raises(ValueError, match=r"^n_predict: field required; base_digest: field required$"):
        parse_config(written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emb_dim": "4.16", "proj_dim": "4.8"}, r"emb_dim ends in 16 and proj_dim in 8"),
        ({"method": "sum_lstm", "tie_weights": False}, r"sum_lstm .* tie_weights"),
        ({"method": "sum_gru"}, r"method 'sum_gru' is not known; there are sum_rnn, sum_lstm"),
        ({"method": "medusa"}, r"method medusa is gone"),
        ({"draft_vocab_size": 24}, r"draft_vocab_size is 24 and vocab_size 23"),
        ({"draft_vocab_size": 0}, r"draft_vocab_size: .* found 0"),
        ({"n_predict": 0}, r"n_predict: .* found 0"),
        ({"vocab_size": True}, r"vocab_size: .* found True"),
        ({"inner_dim": 1024.256}, r"inner_dim: 1024\.256 .*quoted"),
        ({"scale_input": 1}, r"scale_input: .* found 1"),
        ({"base_digest": None}, r"base_digest: .* found None"),
        ({"emb_dims": 8}, r"emb_dims: unknown key; did you mean emb_dim\?"),
    ],
)
def test_values_that_make_no_network(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(config().to_json() | changes)

from typing import Any

import pytest

from spec.heads import parse_config

from .reference import config


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
        ({"method": "sum_gru"}, r"method 'sum_gru' is not known; there are sum_rnn, sum_lstm"),
        ({"draft_vocab_size": 24}, r"draft_vocab_size is 24 and vocab_size 23"),
        ({"draft_vocab_size": 0}, r"draft_vocab_size: .* found 0"),
        ({"vocab_size": True}, r"vocab_size: .* found True"),
        ({"base_digest": None}, r"base_digest: .* found None"),
        ({"emb_dims": 8}, r"emb_dims: unknown key; did you mean emb_dim\?"),
    ],
)
def test_values_that_make_no_network(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(config().to_json() | changes)

"""Any text becomes a key that MLflow takes, and the way back is known."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric

from spec.mlflow_keys import KEY_LIMIT, key

ORDINARY = ["offline.tokens_per_step", "domains.a/b.x", "by_tokens/loss.1", "数学: é", "cnn_xsum", "_x", "a..b"]
ODD = st.text(st.sampled_from("_x-5F2AB/.+ é😀\n"), max_size=20) | st.text(max_size=KEY_LIMIT)


def named(found: str) -> str:
    """The name of a key from which nothing was left out."""
    escapes = re.split(r"_x([0-9A-F]*)_", found)
    return "".join(bytes.fromhex(part).decode() if i % 2 else part for i, part in enumerate(escapes))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, name) for name in ORDINARY),
        ("C++", "C_x2B2B_"),
        ("", "_x_"),
        ("../a//b/", "_x2E2E_/a_x2F_/b_x2F_"),
        ("_x2B_", "_x5F_x2B_"),
        ("_x+_", "_x5F_x_x2B__"),
    ],
)
def test_what_keys_look_like(name: str, expected: str) -> None:
    assert key(name) == expected


@given(ODD)
def test_every_name_is_taken_and_can_be_told_from_its_key(name: str) -> None:
    found = key(name)
    _validate_metric(found, 1.0, 0, 0)
    assert "_x-" in found or named(found) == name


@pytest.mark.parametrize("letter", ["a", "😀", "/", "_x"])
def test_long_names_keep_both_ends_and_stay_apart(letter: str) -> None:
    names = [f"domains.{letter * count}.tokens_per_step" for count in (300, 301)]
    keys = {key(name) for name in names}
    assert len(keys) == 2
    for found in keys:
        _validate_metric(found, 1.0, 0, 0)
        assert (found.startswith("domains."), found.endswith(".tokens_per_step")) == (True, True)

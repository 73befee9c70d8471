"""The identity of what is stored: all that content depends on besides the row itself, by producer. Defined here alone.

Collection adds the format to each of them. Versions of torch and kinds of devices are not part of an identity: they
change roundings, not meanings, and segments only write them down.
"""

from collections.abc import Mapping
from typing import Any

from spec.base import BUCKET
from spec.config import Respond
from spec.heads import Tap
from spec.store.codecs import Codec

RULES = {"states": 1, "tables": 1, "answers": 1}
"""A number for each producer, which is raised when its result for the same input changes: only what it stored before is
then computed again."""

_ENGINES = {"transformers": "transformers, padded to powers of two", "vllm": "vllm"}
"""What an answer's rounding depends on, by respond.engine."""


def states(base: Mapping[str, str], dtype: str, tap: Tap, codec: Codec, arithmetic: str) -> dict[str, Any]:
    """Of the vectors of one tap, in a dtype, which the base (its digests) computed in the dtype `arithmetic`."""
    return {
        "base": base["weights"],
        "tokenizer": base["tokenizer"],  # ids of another one would mean another text
        "dtype": dtype,
        "layer": "last" if tap.layer is None else tap.layer,
        "positions": tap.positions,
        "encoding": codec.encoding,  # how bytes are compressed does not count
        "engine": f"transformers, padded to {BUCKET}",
        "arithmetic": arithmetic,
        "rule": RULES["states"],
    }


def tap_of(identity: Mapping[str, Any]) -> Tap:
    """The tap of an identity of states."""
    return Tap(None if identity["layer"] == "last" else identity["layer"], identity["positions"])


def tables(base: Mapping[str, str], dtype: str) -> dict[str, Any]:
    """Of the base's tables, which are its weights as they are."""
    return {"base": base["weights"], "dtype": dtype, "rule": RULES["tables"]}


def answers(base: Mapping[str, str], dtype: str, params: Respond, arithmetic: str) -> dict[str, Any]:
    """Of the base's answers; vLLM computes in the dtype, whatever transformers would do here."""
    return {
        "base": base["weights"],
        "tokenizer": base["tokenizer"],
        "generation": base["generation"],
        "dtype": dtype,
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "seed": params.seed if params.temperature else None,
        "engine": _ENGINES[params.engine],
        "arithmetic": dtype if params.engine == "vllm" else arithmetic,
        "rule": RULES["answers"],
    }

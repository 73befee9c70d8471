"""The base's own answers, kept by prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spec import base as base_model
from spec.base import Base
from spec.config import Respond
from spec.store.collection import Collection, Writer


def identity(base: Mapping[str, str], dtype: str, params: Respond) -> dict[str, Any]:
    """Everything an answer depends on beside the prompt's tokens."""
    return {
        "base": base["weights"],
        "tokenizer": base["tokenizer"],
        "dtype": dtype,
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "seed": params.seed if params.temperature else None,
        "producer": f"{params.engine}, padded to powers of two",
    }


def produce(
    base: Base,
    collection: Collection,
    keys: Sequence[str],
    prompts: Sequence[NDArray[np.int32]],
    groups: Sequence[Sequence[int]],
    params: Respond,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> None:
    """Let the base answer groups of prompts, and commit one segment a group.

    Args:
        base: the frozen model.
        collection: where the answers go.
        keys: content key of each prompt.
        prompts: tokens of each.
        groups: row numbers, as collection.plan gives them.
        params: length, temperature, seed.
        on_tokens: called with the number of tokens just written.
    """
    with Writer(collection, "none") as writer:
        for group in groups:
            items = [keys[row] for row in group]
            seed = params.seed ^ int(items[0][:15], 16)
            answers = base_model.answer(
                base,
                [prompts[row].tolist() for row in group],
                params.max_new_tokens,
                params.temperature,
                seed,
                on_tokens,
            )
            arrays = {
                "ids": np.concatenate([np.asarray(answer, np.int32) for answer in answers]),
                "token_offsets": np.cumsum([0, *map(len, answers)], dtype=np.int64),
            }
            writer.write(items, arrays, {})


def read(collection: Collection, keys: Sequence[str]) -> list[NDArray[np.int32]]:
    """The answer to each prompt, by its key."""
    places = collection.find()
    segments: dict[str, dict[str, NDArray[Any]]] = {}
    found = []
    for key in keys:
        name, row = places[key]
        if name not in segments:
            segments[name] = collection.read(name)
        start, stop = segments[name]["token_offsets"][row : row + 2]
        found.append(segments[name]["ids"][start:stop])
    return found

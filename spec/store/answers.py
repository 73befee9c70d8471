"""The base's own answers, kept by prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spec import base as base_model
from spec.base import Base
from spec.config import Respond
from spec.store.collection import Collection, Writer, share_out
from spec.store.segment import Row, rows_of

OFFSETS = {"prompt": "prompt_offsets", "answer": "answer_offsets"}


def identity(base: Mapping[str, str], dtype: str, params: Respond) -> dict[str, Any]:
    """Everything an answer depends on beside the prompt's tokens."""
    return {
        "base": base["weights"],
        "tokenizer": base["tokenizer"],
        "generation": base["generation"],
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
    rank: int = 0,
    world: int = 1,
) -> None:
    """Let the base answer groups of prompts, and commit one segment a group.

    Args:
        base: the frozen model.
        collection: where the answers go.
        keys: content key of each prompt.
        prompts: tokens of each.
        groups: row numbers, as plan gives them.
        params: length, temperature, seed.
        on_tokens: called with the number of tokens just written.
        rank: this worker among `world` that share the groups.
        world: number of workers.
    """
    attributes = {"offsets": OFFSETS, "producer": base_model.producer(base.device)}
    with Writer("none") as writer:
        for index, claim in share_out(collection, [[keys[r] for r in group] for group in groups], rank, world):
            asked = [prompts[row] for row in groups[index]]
            seeds = [params.seed ^ int(key[:15], 16) for key in claim.items]
            answers = base_model.answer(
                base,
                [prompt.tolist() for prompt in asked],
                params.max_new_tokens,
                params.temperature,
                seeds,
                on_tokens,
            )
            rows: list[Row] = [
                {"prompt": prompt, "answer": np.asarray(answer, np.int32)}
                for prompt, answer in zip(asked, answers, strict=True)
            ]
            writer.write(claim, partial(list, rows), attributes)


def read(collection: Collection, keys: Sequence[str]) -> list[NDArray[np.int32]]:
    """The answer to each prompt, by its key."""
    places = collection.find()
    segments: dict[str, list[Row]] = {}
    found = []
    for key in keys:
        name, row = places[key]
        if name not in segments:
            segments[name] = rows_of(*collection.read(name))
        found.append(segments[name][row]["answer"])
    return found

"""The base's own answers, kept by prompt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from spec.config import Respond
from spec.store.collection import Collection, Writer, share_out
from spec.store.segment import Row, StoreError, rows_of

log = logging.getLogger(__name__)

ENGINES = {"transformers": "transformers, padded to powers of two", "vllm": "vllm"}
"""What an answer's arithmetic depends on, by respond.engine."""

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
        "producer": ENGINES[params.engine],
    }


class Answer(Protocol):
    """What writes answers: spec.base.answer with its base given, or vLLM's engine."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        on_tokens: Callable[[int], object],
    ) -> list[list[int]]:
        """The tokens that follow each prompt."""
        ...


def produce(
    answer: Answer,
    producer: Mapping[str, str],
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

    Where memory does not suffice for a group, it is answered in parts: an answer does not depend on its company.

    Args:
        answer: the frozen base, as a function.
        producer: what it runs on, noted in each segment.
        collection: where the answers go.
        keys: content key of each prompt.
        prompts: tokens of each.
        groups: row numbers, as plan gives them.
        params: length, temperature, seed.
        on_tokens: called with the number of tokens just written.
        rank: this worker among `world` that share the groups.
        world: number of workers.

    Raises:
        StoreError: memory does not suffice for a single prompt.
    """
    attributes = {"offsets": OFFSETS, "producer": dict(producer)}
    most = params.batch_size
    with Writer("none") as writer:
        for index, claim in share_out(collection, [[keys[r] for r in group] for group in groups], rank, world):
            asked = [prompts[row] for row in groups[index]]
            seeds = [params.seed ^ int(key[:15], 16) for key in claim.items]
            answers: list[list[int]] = []
            while len(answers) < len(asked):
                part = slice(len(answers), len(answers) + most)
                try:
                    answers += answer(
                        [prompt.tolist() for prompt in asked[part]],
                        params.max_new_tokens,
                        params.temperature,
                        seeds[part],
                        on_tokens,
                    )
                except torch.OutOfMemoryError as error:
                    count = len(asked[part])
                    if count == 1:
                        raise StoreError(
                            f"out of memory at a single prompt of {len(asked[part.start])} tokens ({error}); lower "
                            "respond.max_new_tokens or data.max_length, or use a device with more memory"
                        ) from None
                    most = count // 2
                    log.warning("out of memory: going on with %d answers at a time; lower respond.batch_size", most)
            rows: list[Row] = [
                {"prompt": prompt, "answer": np.asarray(written, np.int32)}
                for prompt, written in zip(asked, answers, strict=True)
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

"""The base's own answers, kept by prompt."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from spec.config import Respond
from spec.store import codecs
from spec.store.collection import Collection, Writer, share_out
from spec.store.plan import Parts, item_key, plan_groups
from spec.store.segment import rows_of

OFFSETS = {"prompt": "prompt_offsets", "answer": "answer_offsets"}


def plan(
    prompts: Sequence[NDArray[np.int32]], known: Iterable[str], batch_size: int, bucket: Callable[[int], int]
) -> list[list[int]]:
    """Groups of the prompts that have no answer yet, each of one padded length and at most batch_size prompts."""
    keys, lengths = list(map(item_key, prompts)), list(map(len, prompts))
    return plan_groups(keys, lengths, known, bucket, batch_size, cost=lambda length: 1)


Answer = Callable[[Sequence[Sequence[int]], int, float, Sequence[int], Callable[[int], object]], list[list[int]]]
"""(prompts, max_new_tokens, temperature, seeds, on_tokens) -> the tokens that follow each prompt: spec.base.answer with
its base given, or vLLM's engine."""


def produce(
    answer: Answer,
    producer: Mapping[str, str],
    collection: Collection,
    prompts: Sequence[NDArray[np.int32]],
    groups: Sequence[Sequence[int]],
    params: Respond,
    on_tokens: Callable[[int], object] = lambda count: None,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Let the base answer groups of prompts (row numbers, as plan gives them), and commit one segment a group.

    Where memory does not suffice for a group, it is answered in parts: an answer does not depend on its company.
    `producer` is noted in each segment, `on_tokens` called with the number of tokens just written; `rank` is this
    worker among the `world` that share the groups.
    """
    keys = list(map(item_key, prompts))
    attributes = {"offsets": OFFSETS, "producer": dict(producer)}
    parts = Parts(params.batch_size, "respond.max_new_tokens or data.max_length", "respond.batch_size")

    def ask(group: Sequence[int], part: slice) -> list[list[int]]:
        asked = [prompts[row].tolist() for row in group[part]]
        seeds = [params.seed ^ int(keys[row][:15], 16) for row in group[part]]
        return answer(asked, params.max_new_tokens, params.temperature, seeds, on_tokens)

    wanted = [[(collection, [keys[row] for row in group])] for group in groups]
    with Writer() as writer:
        for index, claims in share_out(wanted, rank, world):
            group = groups[index]
            lengths = [len(prompts[row]) for row in group]
            answers = [ids for _, found in parts.run(partial(ask, group), lengths) for ids in found]
            asked = zip(group, answers, strict=True)
            rows = [{"prompt": prompts[row], "answer": np.asarray(ids, np.int32)} for row, ids in asked]
            writer.write(claims, partial(claims[0].commit, rows, attributes, codecs.NONE))


def read(collection: Collection, prompts: Iterable[NDArray[np.int32]]) -> list[NDArray[np.int32]]:
    """The answer to each prompt."""
    found = collection.find()
    places = [found[item_key(prompt)] for prompt in prompts]
    segments = {name: rows_of(*collection.read(name)) for name in {name for name, _ in places}}
    return [segments[name][row]["answer"] for name, row in places]

"""The base's own answers, kept by prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from spec import base as base_model
from spec.base import Base
from spec.config import Respond
from spec.store import answers
from spec.store.collection import Collection, item_key, plan

BASE = {"weights": "w", "tokenizer": "t"}
GREEDY = Respond(max_new_tokens=12, batch_size=3)
SAMPLED = Respond(max_new_tokens=12, batch_size=3, temperature=1.0)


def make_prompts(count: int = 8) -> list[NDArray[np.int32]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 290, generator.integers(1, 90)).astype(np.int32) for _ in range(count)]


def produce(
    base: Base, root: Path, prompts: list[NDArray[np.int32]], params: Respond, world: int = 1, skip: int = 0
) -> Collection:
    collection = Collection(root, "answers", answers.identity(BASE, "float32", params))
    collection.create()
    keys = [item_key(prompt) for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    groups = plan(keys, lengths, collection.find(), base_model.prompt_bucket, params.batch_size, lambda length: 1)
    for rank in range(world):
        answers.produce(base, collection, keys, prompts, groups[skip:][rank::world], params)
    return collection


def read(collection: Collection, prompts: list[NDArray[np.int32]]) -> list[list[int]]:
    return [found.tolist() for found in answers.read(collection, [item_key(prompt) for prompt in prompts])]


def test_answers_are_the_bases_own(base: Base, tmp_path: Path) -> None:
    prompts = make_prompts()
    collection = produce(base, tmp_path, prompts, GREEDY)
    expected = [base_model.answer(base, [prompt.tolist()], 12)[0] for prompt in prompts]
    assert read(collection, prompts) == expected
    assert read(collection, [*prompts[::-1], prompts[0]]) == [*expected[::-1], expected[0]]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_workers_and_interruptions_change_no_answer(base: Base, tmp_path: Path, params: Respond) -> None:
    prompts = make_prompts()
    once = produce(base, tmp_path / "once", prompts, params)
    produce(base, tmp_path / "late", prompts, params, skip=1)
    late = produce(base, tmp_path / "late", prompts, params, world=2)
    assert late.records() == once.records()
    assert read(late, prompts) == read(once, prompts)


def test_groups_are_sampled_apart(base: Base, tmp_path: Path) -> None:
    """The same draws for every group would give prompts of equal place correlated answers."""
    prompts = [np.asarray([5, 6, 7 + i], np.int32) for i in range(6)]
    seeds = []
    collection = produce(base, tmp_path, prompts, SAMPLED.model_copy(update={"seed": 1}))
    other = produce(base, tmp_path, prompts, SAMPLED.model_copy(update={"seed": 2}))
    assert collection.folder != other.folder
    assert read(collection, prompts) != read(other, prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model, "answer", lambda base, asked, most, hot, seed, seen: seeds.append(seed) or [[1]] * 3)
        produce(base, tmp_path / "seeds", prompts, SAMPLED)
    assert len(set(seeds)) == len(seeds) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"base": {"weights": "v", "tokenizer": "t"}},
        {"base": {"weights": "w", "tokenizer": "u"}},
        {"dtype": "bfloat16"},
        {"params": Respond(max_new_tokens=13)},
        {"params": Respond(max_new_tokens=12, temperature=0.5)},
    ],
)
def test_identity_holds_what_an_answer_depends_on(changed: dict[str, object]) -> None:
    given = {"base": BASE, "dtype": "float32", "params": GREEDY}
    assert answers.identity(**given) != answers.identity(**(given | changed))  # type: ignore[arg-type]


def test_identity_leaves_out_what_no_answer_depends_on() -> None:
    """A greedy answer needs no seed, and the batch is not part of it."""
    other = GREEDY.model_copy(update={"seed": 5, "batch_size": 9})
    assert answers.identity(BASE, "float32", GREEDY) == answers.identity(BASE, "float32", other)
    hot = SAMPLED.model_copy(update={"seed": 5})
    assert answers.identity(BASE, "float32", SAMPLED) != answers.identity(BASE, "float32", hot)

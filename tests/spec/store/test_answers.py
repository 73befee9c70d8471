"""The base's own answers, kept by prompt."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spec import base as base_model
from spec import files
from spec.base import Base
from spec.config import Respond
from spec.store import answers, identity
from spec.store.collection import Collection
from spec.store.plan import item_key
from spec.store.segment import rows_of
from tests.tiny import at_once, digests

BASE = {"weights": "w", "tokenizer": "t", "generation": "g"}
GREEDY = Respond(max_new_tokens=12, batch_size=3)
SAMPLED = Respond(max_new_tokens=12, batch_size=3, temperature=1.0)

Prompt = NDArray[np.int32]


def make_prompts(count: int = 8, longest: int = 90) -> list[Prompt]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 290, generator.integers(1, longest)).astype(np.int32) for _ in range(count)]


def made(root: Path, params: Respond) -> Collection:
    collection = Collection(root, "answers", identity.answers(BASE, "float32", params, "float32"))
    collection.create()
    return collection


def produce(
    base: Base,
    root: Path,
    prompts: Sequence[Prompt],
    params: Respond,
    world: int = 1,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> Collection:
    """Let `world` workers answer at the same time, each with a collection of its own."""
    collection = made(root, params)
    groups = answers.plan(prompts, collection.find(), params.batch_size, base_model.prompt_bucket)

    def work(rank: int) -> None:
        answer, made_by = partial(base_model.answer, base), base.producer
        answers.produce(answer, made_by, made(root, params), prompts, groups, params, on_tokens, rank, world)

    at_once(work, world)
    return collection


def read(collection: Collection, prompts: Sequence[Prompt]) -> list[list[int]]:
    return [found.tolist() for found in answers.read(collection, prompts)]


def test_answers_are_the_bases_own_and_lie_beside_their_prompts(base: Base, tmp_path: Path) -> None:
    prompts = make_prompts()
    collection = produce(base, tmp_path, prompts, GREEDY)
    expected = [base_model.answer(base, [prompt.tolist()], 12)[0] for prompt in prompts]
    assert read(collection, [*prompts[::-1], prompts[0]]) == [*expected[::-1], expected[0]]
    places = collection.find()
    for prompt in prompts:
        name, row = places[item_key(prompt)]
        assert collection.verify(name).items[row] == item_key(prompt)
        arrays, attributes = collection.read(name)
        np.testing.assert_array_equal(rows_of(arrays, attributes)[row]["prompt"], prompt, strict=True)
        assert attributes["producer"] == base.producer


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_any_number_of_workers_writes_the_same_answers(base: Base, tmp_path: Path, params: Respond) -> None:
    prompts = make_prompts(12)
    once, shared = (produce(base, tmp_path / str(world), prompts, params, world) for world in (1, 2))
    assert digests(shared) == digests(once)
    assert len(once.records()) > 2


def test_appended_prompts_are_all_that_is_computed(base: Base, tmp_path: Path) -> None:
    prompts = make_prompts(10)
    before = digests(produce(base, tmp_path, prompts[:6], SAMPLED))
    written: list[int] = []
    collection = produce(base, tmp_path, prompts, SAMPLED, on_tokens=written.append)
    assert before.items() < digests(collection).items()
    assert sum(written) == sum(map(len, read(collection, prompts[6:])))
    assert read(collection, prompts) == read(produce(base, tmp_path / "fresh", prompts, SAMPLED), prompts)


def test_every_prompt_has_a_seed_of_its_own(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws for two prompts would give them correlated answers."""
    prompts, seeds = [np.asarray([5, 6, 7 + i], np.int32) for i in range(6)], list[int]()
    monkeypatch.setattr(base_model, "answer", lambda *given: seeds.extend(given[4]) or [[1]] * len(given[1]))
    for seed in (0, 1):
        produce(base, tmp_path, prompts, SAMPLED.model_copy(update={"seed": seed}))
    assert len(set(seeds)) == len(seeds) == 2 * len(prompts)


def test_identity_holds_what_an_answer_depends_on() -> None:
    """A greedy answer needs no seed, and the batch is not part of it."""
    given: dict[str, Any] = {"base": BASE, "dtype": "float32", "params": GREEDY, "arithmetic": "float32"}
    same = GREEDY.model_copy(update={"seed": 5, "batch_size": 9})
    assert identity.answers(**given) == identity.answers(**(given | {"params": same}))
    bases = ({**BASE, "weights": "v"}, {**BASE, "tokenizer": "u"}, {**BASE, "generation": "h"})
    params = (Respond(max_new_tokens=13), SAMPLED, SAMPLED.model_copy(update={"seed": 5}))
    changed = [{"dtype": "bfloat16"}, {"arithmetic": "bfloat16"}]
    changed += [*({"base": each} for each in bases), *({"params": each} for each in params)]
    found = [files.digest_json(identity.answers(**(given | each))) for each in ({}, *changed)]
    assert len(set(found)) == len(found)


def test_a_group_that_does_not_fit_into_memory_is_answered_in_parts(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = make_prompts(9, longest=60)
    params = Respond(max_new_tokens=12, batch_size=9)
    expected = read(produce(base, tmp_path / "whole", prompts, params), prompts)
    real, asked = base_model.answer, []

    def small(base: Base, prompts: Sequence[Sequence[int]], *rest: Any) -> list[list[int]]:
        asked.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("no memory")
        return real(base, prompts, *rest)

    monkeypatch.setattr(base_model, "answer", small)
    assert read(produce(base, tmp_path / "parts", prompts, params), prompts) == expected
    assert asked == [9, 4, 2, 2, 2, 2, 1]
    assert caplog.messages[-1] == "out of memory: now 2 at a time; lower respond.batch_size to start with fewer"

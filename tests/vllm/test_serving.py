"""Speculators in vLLM's own server, over HTTP, in float32: what is written and how much is accepted."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import pytest

from spec import acceptance, heads
from spec.config import Decode
from spec.drafting import Source, Sources, open_lookup
from spec.serving import server as servers
from spec.serving.server import Server
from spec.store import tables
from tests.vllm.small import NEW_TOKENS, PROMPTS, Trained, serving

NAME = "models/base"
MESSAGES = [{"role": "user", "content": "Name three animals that live in the sea, and say what each of them eats."}]
LENGTHS = [8, 48, 12, 40, 16, 32, 20, 24]
CANCELLED = 1


@dataclass(frozen=True)
class Written:
    """What the base alone writes."""

    answers: list[list[int]]  # to each prompt
    singles: list[list[int]]  # to the first prompts, each asked on its own, of LENGTHS tokens
    chat: str  # to MESSAGES
    longest: list[int]  # to the longest prompt, up to the model's maximal length


@dataclass(frozen=True)
class Road:
    """A way to serve a speculator.

    Attributes:
        folder: fixture that trains it.
        source: of drafts.
        most: tokens that a step drafts.
    """

    folder: str
    source: Source
    most: int


ROADS = {
    "proposer, head": Road("trained", "head", 3),
    "proposer, hybrid": Road("trained", "hybrid", servers.NGRAM_DRAFT),
    "vLLM's own, eagle3": Road("tiny", "head", 3),
}


def with_speculator(trained: Trained, source: Source) -> list[str]:
    base = str(trained.root / NAME)
    return servers.command(trained.checkpoint, Decode(draft=source), base=base, dtype="float32", more=options(trained))


def longest_prompt(trained: Trained) -> list[int]:
    return max(trained.prompts, key=len)


def options(trained: Trained) -> list[str]:
    """A name, and a maximal length that the longest prompt's answer reaches."""
    room = str(len(longest_prompt(trained)) + NEW_TOKENS + 8)
    return ["--served-model-name", NAME, "--max-model-len", room]


@functools.cache
def written_by(trained: Trained) -> Written:
    """What the base alone writes, once for all roads with this base."""
    alone = [*servers.plain_command(str(trained.root / NAME), dtype="float32"), *options(trained)]
    with serving(alone, trained.root, "alone") as server:
        return Written(
            answer(server, trained.prompts),
            [
                answer(server, [ids], length)[0]
                for ids, length in zip(trained.prompts[: len(LENGTHS)], LENGTHS, strict=True)
            ],
            client(server).chat.completions.create(**chat()).choices[0].message.content or "",
            to_the_end(server, trained),
        )


@pytest.fixture(scope="module", params=ROADS.values(), ids=ROADS)
def road(request: pytest.FixtureRequest) -> Road:
    found: Road = request.param
    return found


@pytest.fixture(scope="module")
def served(road: Road, request: pytest.FixtureRequest) -> Trained:
    found: Trained = request.getfixturevalue(road.folder)
    return found


@pytest.fixture(scope="module")
def written(served: Trained) -> Written:
    return written_by(served)


@pytest.fixture(scope="module")
def server(road: Road, served: Trained, written: Written) -> Iterator[Server]:
    """With a speculator, once the server without one is gone."""
    with serving(with_speculator(served, road.source), served.root, road.source) as running:
        yield running


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0)


def answer(server: Server, prompts: list[list[int]], length: int = NEW_TOKENS, **more: Any) -> list[list[int]]:
    """Greedy answers to prompts that are asked at once, all as token ids."""
    done = client(server).completions.create(
        model=NAME, prompt=prompts, max_tokens=length, temperature=0, extra_body={"return_token_ids": True, **more}
    )
    return [choice.model_extra["token_ids"] for choice in sorted(done.choices, key=lambda choice: choice.index)]


def to_the_end(server: Server, trained: Trained) -> list[int]:
    ids = longest_prompt(trained)
    return answer(server, [ids], NEW_TOKENS + 8, ignore_eos=True)[0]


def chat() -> dict[str, Any]:
    return {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": 40}


def test_answers_are_those_of_the_base_alone(served: Trained, written: Written, server: Server) -> None:
    before = server.counters()
    assert answer(server, served.prompts) == written.answers
    accepted = "vllm:spec_decode_num_accepted_tokens_total"
    assert server.counters()[accepted] > before.get(accepted, 0)


def test_mean_acceptance_length_is_the_walks(served: Trained, road: Road, server: Server) -> None:
    before = server.counters()
    answer(server, served.prompts)
    measured = servers.mean_acceptance_length(before, server.counters())
    head = heads.load(served.checkpoint, tables=tables.Tables(served.reader.tables))
    sources = Sources(Decode(), road.source, head.config, open_lookup(served.checkpoint, head.config))
    answers = acceptance.draft_answers(head, served.reader, range(PROMPTS), sources=sources)
    cut = [answer.cut(road.most) for answer in answers]
    # vLLM counts the steps that have a draft.
    walks = [replace(walk, accepted=walk.accepted[walk.drafted > 0]) for walk in acceptance.walks(served.reader, cut)]
    low, high = acceptance.interval(walks)
    figure = acceptance.tokens_per_step(walks)
    print(f"{road}: vLLM {measured:.3f}, offline {figure:.3f}, interval {low:.3f} to {high:.3f}")
    assert figure > 1.15
    assert low <= measured <= high


def test_a_chat_is_streamed(written: Written, server: Server) -> None:
    stream = client(server).chat.completions.create(**chat(), stream=True)
    parts = [chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    assert len(parts) > 2
    assert "".join(parts) == written.chat


def test_eight_at_once_and_one_gives_up(served: Trained, written: Written, server: Server) -> None:
    started = threading.Barrier(len(LENGTHS))

    def ask(i: int) -> list[int]:
        started.wait(60)
        stream = client(server).completions.create(
            model=NAME,
            prompt=served.prompts[i],
            max_tokens=LENGTHS[i],
            temperature=0,
            stream=True,
            extra_body={"return_token_ids": True},
        )
        ids: list[int] = []
        for chunk in stream:
            ids += chunk.choices[0].model_extra["token_ids"] or []
            if i == CANCELLED and len(ids) >= 4:
                stream.close()
                break
        return ids

    with ThreadPoolExecutor(len(LENGTHS)) as pool:
        found = list(pool.map(ask, range(len(LENGTHS))))
    cancelled = found[CANCELLED]
    assert 4 <= len(cancelled) < len(written.singles[CANCELLED])
    assert cancelled == written.singles[CANCELLED][: len(cancelled)]
    others = [i for i in range(len(LENGTHS)) if i != CANCELLED]
    assert [found[i] for i in others] == [written.singles[i] for i in others]


def test_an_answer_ends_at_the_maximal_length(served: Trained, written: Written, server: Server) -> None:
    assert len(written.longest) == NEW_TOKENS + 8
    assert to_the_end(server, served) == written.longest


def test_a_server_that_cannot_start_says_why(trained: Trained, tmp_path: Path) -> None:
    command = with_speculator(trained, "head")
    missing = json.dumps({"speculator": {"checkpoint": str(tmp_path / "nowhere"), "draft": "head"}})
    command[command.index("--additional-config") + 1] = missing
    with pytest.raises(servers.ServingError, match="nowhere"), serving(command, tmp_path, "refused"):
        pass

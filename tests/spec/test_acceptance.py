"""The exact walk next to decoding one token at a time, and drafts next to the speculator's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spec import acceptance
from spec.acceptance import Answer, Walk, draft_answers, interval, loops, tokens_per_step, walk, walks
from spec.base import Teacher
from spec.corpus import TokenSequence
from spec.heads import LAST, Speculator, build
from spec.store.reader import FeatureReader
from tests.spec.heads.reference import config
from tests.tiny import chain, sequence, store_features

V, D = 24, 8
tokens = st.lists(st.integers(0, 2), min_size=1, max_size=30)  # three letters: drafts often match by chance
BLOCK = list(range(100, 164))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    answer = draw(tokens)
    n = draw(st.integers(1, 5))
    return answer, [draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)) for _ in answer]


def simulate(answer: list[int], drafts: list[list[int]]) -> list[int]:
    """Accepted drafts of each step, by decoding for real: the base wants `answer` and takes what agrees with it."""
    written = answer[:1]
    accepted = []
    while len(written) < len(answer):
        draft, count = drafts[len(written) - 1], 0
        for token in draft:
            if len(written) < len(answer) and token == answer[len(written)]:
                written.append(token)
                count += 1
            else:
                break
        if len(written) < len(answer):
            written.append(answer[len(written)])  # the base's own token
        accepted.append(count)
    return accepted


@given(cases())
def test_the_walk_is_what_decoding_does(case: tuple[list[int], list[list[int]]]) -> None:
    ids, drafts = case
    prompt = [9, 9]
    answer = Answer(np.asarray(prompt + ids, np.int32), len(prompt), 0).drafted(drafts)
    assert answer.length == len(ids)
    found = walk(answer.matches, answer.length)
    assert found.tolist() == simulate(ids, drafts)
    assert len(ids) - 1 <= found.sum() + len(found) <= len(ids)


def made(*accepted: Any) -> list[Walk]:
    return [Walk(np.asarray(steps, np.int64)) for steps in accepted]


@given(st.lists(st.lists(st.integers(0, 4), max_size=9), max_size=9), st.integers(1, 5))
def test_figures_follow_from_the_steps(accepted: list[list[int]], n: int) -> None:
    found, every = made(*accepted), [a for part in accepted for a in part]
    assert tokens_per_step(found) == pytest.approx(1 + sum(every) / max(len(every), 1))
    shares, conditional = acceptance.acceptance(found, n), acceptance.conditional(found, n)
    for i in range(1, n + 1):
        reached, counted = sum(a >= i - 1 for a in every), sum(a >= i for a in every)
        assert shares[i - 1] == pytest.approx(counted / max(len(every), 1))
        assert conditional[i - 1] == pytest.approx(counted / max(reached, 1))
    if every:
        exactly = [every.count(k) for k in range(n)] + [sum(a >= n for a in every)]
        assert acceptance.histogram(found, n) == pytest.approx([count / len(every) for count in exactly])
    assert acceptance.longest(found) == max(every, default=0)
    rates = acceptance.conditional(found, acceptance.longest(found))
    assert acceptance.expected_tokens_per_step(rates) == pytest.approx(tokens_per_step(found))


def test_a_gain_is_judged_on_the_same_answers() -> None:
    """Answers differ far more than the two sources do on each of them: drawn apart, nothing would be sure."""
    generator = np.random.default_rng(0)
    many = [generator.binomial(6, generator.random(), 10) for _ in range(60)]
    plain, better = made(*many), made(*[steps + (generator.random(10) < 0.2) for steps in many])
    low, high = interval(better, plain)
    assert 0.1 < low < tokens_per_step(better) - tokens_per_step(plain) < high < 0.3
    assert interval(better)[0] < tokens_per_step(plain)
    assert interval(better, better) == interval([], []) == (0, 0)
    assert interval([]) == interval(made([], [])) == (1.0, 1.0)
    assert interval(made([2, 1])) == (2.5, 2.5)


def test_the_interval_covers_its_nominal_share() -> None:
    """Answers are drawn again and again from one population; 95 % of the intervals should hold its figure."""
    generator = np.random.default_rng(0)
    population = [generator.binomial(3, generator.random(), 10) for _ in range(2000)]
    true = 1 + np.mean(population)
    held = 0
    for _ in range(100):
        low, high = interval([Walk(population[i]) for i in generator.integers(2000, size=40)])
        held += low <= true <= high
    assert 93 <= held <= 96


@pytest.mark.parametrize(
    ("answer", "looping"),
    [
        ([7] * 24, True),
        ([7] * 23, False),
        ([5, 6, 8, 1, 2] + [1, 2] * 12, True),
        ([1, 2] * 12 + [0], True),  # a closing stop token
        ([1, 2] * 12 + [0, 0], False),
        ([1, 2] * 12 + [3, 4, 5], False),  # it looped, and came out of it
        (BLOCK * 3, True),
        (BLOCK * 2, False),
        ([*BLOCK, 99] * 3, False),  # longer than any block that counts
        (BLOCK[:10] * 3, True),
        (BLOCK[:10] * 2 + BLOCK[:4], False),
        ([], False),
    ],
)
def test_loops(answer: list[int], looping: bool) -> None:
    assert loops(answer) == looping


ROWS = [
    sequence([0, 0, 1, 1, 1, 1], [5, 6, 7, 8, 9, 10], "maths"),
    sequence([0, 1, 1, 0, 0, 1, 1, 1], range(8), "chat"),  # two turns: the last one counts
    TokenSequence(np.arange(7, dtype=np.int32), np.ones(7, np.uint8), "text", 0),  # plain text
    sequence([0, 0, 0, 0]),  # no answer
    sequence([0, 0, 0, 1], [1, 2, 3, 4], "code"),  # an answer of one token
    *chain(8, V),
]
STARTS = {0: 2, 1: 5, 2: 1, 4: 3} | {5 + i: row.prompt_length for i, row in enumerate(chain(8, V))}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> FeatureReader:
    root = tmp_path_factory.mktemp("store")
    return FeatureReader(store_features(root, ROWS, vocab_size=V, hidden_size=D), root)


def speculator(method: Any, draft_vocab_size: int | None = None) -> Speculator:
    shape = config(method, hidden_size=D, vocab_size=V, draft_vocab_size=draft_vocab_size)
    made = build(shape, torch.arange(1, V, 2) if draft_vocab_size else None)
    made.initialise(seed=1)
    return made.double()


@pytest.mark.parametrize(("limit", "size"), [("CHUNK", 1), ("CHUNK", 5), ("CHUNK", 2048), ("CHUNK_TOKENS", 20)])
@pytest.mark.parametrize(("method", "drafted"), [("sum_rnn", None), ("sum_rnn", V // 2), ("sum_lstm", None)])
def test_drafts_are_the_speculators_own_at_each_position(
    reader: FeatureReader, method: str, drafted: int | None, limit: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few positions or tokens, prompts included, are drafted along at one time."""
    monkeypatch.setattr(acceptance, limit, size)
    heads = speculator(method, drafted)
    counts: list[int] = []
    answers = draft_answers(heads, reader, on_positions=counts.append)
    assert [(answer.index, answer.start) for answer in answers] == list(STARTS.items())
    assert sum(counts) == sum(answer.length for answer in answers)
    assert (len(counts) > 1) == (size < 2048)
    for answer in answers:
        row, full = ROWS[answer.index], reader.packed([answer.index])
        np.testing.assert_array_equal(answer.ids, row.ids)
        assert answer.lengths == [3] * (len(row) - answer.start)
        for j in range(answer.length - 1):  # after the last token there is nothing to draft from
            t = answer.start + j - 1
            state = full.states[LAST][full.starts.tolist().index(t)]
            direct = heads.draft(state[None], torch.tensor([int(row.ids[t + 1])]))
            assert answer.drafts[j] == direct[0].tolist()[: answer.matches[j] + 1]


def test_what_follows_an_answer_unsupervised_is_no_part_of_it(tmp_path: Path) -> None:
    rows = [TokenSequence(np.arange(1, 5, dtype=np.int32), np.array([0, 1, 1, 0], np.uint8), "a", 1)]
    (answer,) = draft_answers(
        speculator("sum_rnn"), FeatureReader(store_features(tmp_path, rows, vocab_size=V, hidden_size=D), tmp_path)
    )
    assert (answer.ids.tolist(), answer.start, len(answer.drafts)) == ([1, 2, 3], 1, 2)


def test_walks_know_domain_loops_and_who_wrote_the_answer(tmp_path: Path) -> None:
    looping = sequence([0] + [1] * 26, [3] + [4, 5] * 13, "code")
    rows = [ROWS[0], ROWS[2], looping]
    reader = FeatureReader(store_features(tmp_path, rows, vocab_size=V, hidden_size=D), tmp_path)
    answers = draft_answers(speculator("sum_rnn"), reader, [2, 0, 1])
    found = walks(reader, [answer.drafted([[9]] * answer.length) for answer in answers])
    expected = [("maths", False, True), ("text", False, False), ("code", True, True)]
    assert [(w.domain, w.looping, w.greedy) for w in found] == expected
    assert found[0].accepted.tolist() == [0, 1]  # 7 8 [9] 10: the draft after 8 is right
    assert found[0].drafted.tolist() == [1, 1]


@given(cases(), st.integers(1, 6))
def test_tokens_per_step_by_draft_length(case: tuple[list[int], list[list[int]]], longest: int) -> None:
    ids, drafts = case
    answer = Answer(np.asarray([9, *ids], np.int32), 1, 0).drafted(drafts)
    found = acceptance.tokens_per_step_by_length([answer], range(1, longest + 1))
    cut = [simulate(ids, [draft[:length] for draft in drafts]) for length in range(1, longest + 1)]
    assert found == pytest.approx([1 + float(np.mean(steps)) if steps else 1.0 for steps in cut])


@pytest.mark.parametrize("chunk", [V, 2**24])
def test_expected_acceptance_by_hand(reader: FeatureReader, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "CHUNK_LOGITS", chunk)
    lm_head = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    answers = draft_answers(speculator("sum_rnn"), reader)

    def partly_right(answer: Answer) -> list[list[int]]:  # at place j, j % 3 tokens and then a wrong one
        tokens = answer.ids[answer.start :].tolist()
        return [[*tokens[j + 1 : j + 1 + j % 3], 0] for j in range(len(tokens))]

    sources = {"head": answers, "scripted": [each.drafted(partly_right(each)) for each in answers]}
    found = {name: walks(reader, drafted) for name, drafted in sources.items()}
    counts: list[int] = []
    expected = acceptance.expected_acceptance(reader, Teacher(lm_head), answers, found, [0.5, 2.0], counts.append)
    assert sum(counts) == sum(answer.length for answer in answers)
    for name, drafted in sources.items():
        for temperature in (0.5, 2.0):
            sums, steps = np.zeros(9), np.zeros(9)
            for answer, walked in zip(drafted, found[name], strict=True):
                full, made, at = reader.packed([answer.index]), answer.drafts, 0
                states = full.states[LAST][full.starts >= answer.start - 1]
                for accepted in walked.accepted.tolist():
                    steps[: accepted + 1] += 1
                    for i in range(min(accepted + 1, len(made[at]), answer.length - 1 - at)):
                        logits = lm_head @ states[at + 1 + i]
                        sums[i] += float((logits / temperature).softmax(0)[made[at][i]])
                    at += accepted + 1
            rates = expected[name][temperature]
            assert rates == pytest.approx((sums / np.maximum(steps, 1))[: len(rates)], rel=1e-5)
            assert not sums[len(rates) :].any()

"""The base's answers beside those of transformers' own generate."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.bases import make
from bench.bases import prompts as short_prompts
from spec import base as base_model
from spec.base import Base, BaseError, answer, bucket, hidden_states, load, prompt_bucket
from spec.config import Model
from tests.tiny import generate, shapes_of

NEW = 24
RECURRENT = ["qwen3_next", "lfm2", "granitemoehybrid", "mamba2", "recurrent_gemma", "minimax"]


@pytest.fixture(scope="module")
def halves(bases: dict[str, Base]) -> dict[str, Base]:
    """The same in bfloat16."""
    halved = {name: copy.deepcopy(base.model).to(torch.bfloat16) for name, base in bases.items()}
    return {name: replace(bases[name], model=model, dtype=torch.bfloat16) for name, model in halved.items()}


def prompts(count: int, longest: int = 90, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 290, generator.integers(1, longest)).tolist() for _ in range(count)]


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_answers_are_those_of_generate(bases: dict[str, Base], family: str) -> None:
    base = bases[family]
    asked = prompts(12)
    answers = answer(base, asked, NEW)
    assert answers == [generate(base, prompt, NEW) for prompt in asked]
    assert len({len(tokens) for tokens in answers}) > 2  # some end early, or this proves little


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_no_answer_depends_on_its_company(halves: dict[str, Base], family: str, temperature: float) -> None:
    """In bfloat16, where other code for another number of rows rounds otherwise."""
    base = halves[family]
    asked, seeds = prompts(20, longest=64), list(range(20))

    def answers(rows: Sequence[int]) -> list[list[int]]:
        return answer(base, [asked[row] for row in rows], NEW, temperature, [seeds[row] for row in rows])

    together = answers(range(20))
    assert [answers([row])[0] for row in range(20)] == together
    assert answers(range(20)[::-1]) == together[::-1]
    assert [*answers(range(9)), *answers(range(9, 20))] == together
    assert len(set(map(len, together))) > 2


def test_finished_rows_leave_the_batch(base: Base) -> None:
    asked = prompts(24)
    writing: list[int] = []
    with shapes_of(base) as shapes:
        answers = answer(base, asked, NEW, on_token=writing.append)
    assert writing == [sum(len(tokens) > step for tokens in answers) for step in range(len(writing))]
    assert writing[-1] < writing[0] == len(asked)
    assert sum(writing) == sum(map(len, answers))
    batches = [batch for batch, _ in shapes]
    for rows, batch in zip(writing, batches, strict=True):
        assert rows <= batch
        assert base_model.COMPACT * batch < rows or rows < base_model.LEAST_ROWS
    assert base_model.LEAST_ROWS <= batches[-1] < batches[0]


def test_a_batch_has_so_many_rows_that_its_size_rounds_nothing_otherwise(base: Base) -> None:
    writing: list[int] = []
    with shapes_of(base) as shapes:
        answers = answer(base, prompts(3), NEW, on_token=writing.append)
    assert len(answers) == 3
    assert {batch for batch, _ in shapes} == {base_model.LEAST_ROWS}
    assert sum(writing) == sum(map(len, answers))  # idle rows count for nothing


def test_the_loop_ends_when_every_row_has(base: Base) -> None:
    asked = [p for p, tokens in zip(prompts(12), answer(base, prompts(12), NEW), strict=True) if len(tokens) < NEW]
    steps: list[int] = []
    answers = answer(base, asked, 200, on_token=steps.append)
    assert len(steps) == max(map(len, answers)) < NEW


def test_sampling_follows_the_seeds(base: Base) -> None:
    asked, seeds = prompts(4), [1, 2, 3, 4]
    drawn = answer(base, asked, NEW, temperature=1.0, seeds=seeds)
    assert answer(base, asked, NEW, temperature=1.0, seeds=seeds) == drawn
    other = answer(base, asked, NEW, temperature=1.0, seeds=[1, 2, 3, 5])
    assert other[:3] == drawn[:3]
    assert other[3] != drawn[3]
    assert drawn != answer(base, asked, NEW)
    assert answer(base, asked, NEW, temperature=1e-4, seeds=seeds) == answer(base, asked, NEW)
    assert len(set(map(tuple, answer(base, asked[:1] * 4, NEW, temperature=1.0, seeds=seeds)))) > 2


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_samples_have_the_softmaxs_frequencies(base: Base, temperature: float) -> None:
    (prompt,) = prompts(1, longest=8)
    count = 500
    drawn = Counter(tokens[0] for tokens in answer(base, [prompt] * count, 1, temperature, range(3, 3 + count)))
    logits = base.model(torch.tensor([prompt])).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    assert expected.max() < 0.95
    for token in expected.topk(5).indices.tolist():
        p = float(expected[token])
        assert abs(drawn[token] / count - p) < 4.5 * (p * (1 - p) / count) ** 0.5


@given(st.integers(1, 5000))
def test_buckets(length: int) -> None:
    padded = bucket(length)
    assert padded % base_model.BUCKET == 0
    assert length <= padded < length + base_model.BUCKET
    padded = prompt_bucket(length)
    assert padded == base_model.BUCKET or (padded & (padded - 1) == 0 and padded < 2 * length)
    assert padded >= max(length, base_model.BUCKET)


def test_answers_end_at_the_last_position_where_there_is_a_table_of_them(base: Base) -> None:
    most = base.limits.most
    assert most == 512
    asked = [([*range(5, 290)] * 2)[: most - 5], [*range(3, 290)]]
    answers = answer(base, asked, 300)
    assert len(answers[0]) == 5
    assert answers[0][-1] not in base.stop_ids  # which would have ended it before the limit
    assert [answer(base, [prompt], 300)[0] for prompt in asked] == answers
    assert answers[0] == generate(base, asked[0], 5)
    assert answers[1] == generate(base, asked[1], most - len(asked[1]))
    with pytest.raises(BaseError, match="a prompt has 512 tokens and the base 512 positions"):
        answer(base, [[5] * most], 3)


def test_padding_beyond_the_last_position_is_not_read(base: Base) -> None:
    ids = torch.full((2, 600), 5)
    states = hidden_states(base.model, ids)
    assert states.shape[:2] == (2, 600)
    assert torch.equal(states[:, :512], hidden_states(base.model, ids[:, :512]))
    assert states[:, 512:].isnan().all()


def test_rotations_go_on_beyond_training_with_a_word(bases: dict[str, Base], caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        answer(bases["qwen2"], [[5] * 510], 6)
    assert ["512 positions" in message for message in caplog.messages] == [True]


def test_an_id_without_a_row_is_refused(base: Base) -> None:
    with pytest.raises(BaseError, match=f"the id {base.vocab_size}, for which the base has no row"):
        answer(base, [[5, base.vocab_size]], 3)


def test_prompts_as_long_as_their_bucket_and_near_the_last_position_share_batches(base: Base) -> None:
    lengths = [base_model.BUCKET] * 5 + [5] * 5
    with shapes_of(base) as shapes:
        answer(base, [[5] * length for length in lengths], 1)
        answer(base, [[5] * length for length in (300, 310, *lengths)], 200)
    assert {batch for batch, _ in shapes[:2]} == {10, 12}


@pytest.mark.parametrize("family", ["llama4", "mistral3", "qwen2_vl"])
def test_the_language_model_of_images_is_a_base(folder: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spec.base.loading.check_tokenizer", lambda *_: None)  # the folder's has more tokens
    made = make(family)
    made.model.save_pretrained(folder)
    loaded = load(Model(), folder, "digest", torch.device("cpu"), dtype="float32")
    assert answer(loaded, short_prompts(), NEW) == [generate(made, prompt, NEW) for prompt in short_prompts()]


@pytest.mark.parametrize("family", RECURRENT)
def test_a_recurrent_state_sees_no_padding_and_no_company(family: str) -> None:
    base = make(family)
    base.model.generation_config.eos_token_id = [*range(2, 96, 8)]
    asked = [prompt for prompt in short_prompts(5) for _ in range(6)] + short_prompts()
    asked = [[*prompt[:-1], 3 + i] for i, prompt in enumerate(asked)]
    together = answer(base, asked, NEW)
    assert together == [generate(base, prompt, NEW) for prompt in asked]
    assert len(set(map(len, together))) > 1  # rows have left their batch
    assert [answer(base, [prompt], NEW)[0] for prompt in asked[:4]] == together[:4]


@pytest.mark.parametrize("family", RECURRENT)
def test_padding_on_the_right_changes_no_state_of_a_recurrent_base(family: str) -> None:
    base, ids = make(family), torch.tensor(short_prompts(1))
    with torch.inference_mode():
        states = hidden_states(base.model, ids)
        padded = hidden_states(base.model, torch.nn.functional.pad(ids, (0, 64 - ids.shape[1])))
    torch.testing.assert_close(padded[:, : ids.shape[1]], states, rtol=1e-4, atol=1e-4)

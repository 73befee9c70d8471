"""Decoding on the device, in float32: what is written with drafts is what the base writes alone."""

from typing import Any

import pytest
import torch

from spec import base as base_model
from spec.config import Model
from spec.decoding import LanguageModelWithSpeculator
from spec.drafting import Source
from tests.spec.training.runs import make_speculator
from tests.tiny import Family, make_base

TOKENS = 40
PROMPTS = [[5, 6, 7, 8, 9] * 3, [100, 17, 230, 4], [250]]


METHODS: dict[Family, str] = {"gpt2": "sum_rnn", "qwen2": "eagle3"}


@pytest.fixture(scope="module", params=METHODS)
def lm(
    tmp_path_factory: pytest.TempPathFactory, device: torch.device, request: pytest.FixtureRequest
) -> LanguageModelWithSpeculator:
    family: Family = request.param
    folder = make_base(tmp_path_factory.mktemp("base"), family)
    model = base_model.load(Model(), folder, "digest", device, "float32")
    layer = base_model.layer_of(model.model)
    shape: dict[str, Any] = {"hidden_size": model.hidden_size, "vocab_size": model.vocab_size, "layers": 2}
    shape |= {"layer": layer.model_dump()} if METHODS[family] == "eagle3" else {}
    speculator = make_speculator(METHODS[family], inner_dim=(32,), emb_dim=(32,), proj_dim=(32,), **shape)
    tables = {name: table.cpu() for name, table in {**model.tables, **base_model.last_layer(model.model)}.items()}
    speculator.initialise(tables)
    speculator.lend(tables)
    return LanguageModelWithSpeculator(model, speculator.to(model.device))


@pytest.mark.parametrize("draft", ["head", "ngram", "hybrid"])
def test_greedy_answers_are_the_bases_own(draft: Source, lm: LanguageModelWithSpeculator) -> None:
    for prompt in PROMPTS:
        plain = lm.generate(prompt, TOKENS, draft="none").tokens
        assert lm.generate(prompt, TOKENS, draft=draft).tokens == plain


@pytest.mark.parametrize("draft", ["head", "ngram", "hybrid"])
def test_sampled_answers_follow_from_the_seed_alone(draft: Source, lm: LanguageModelWithSpeculator) -> None:
    for seed, prompt in enumerate(PROMPTS):
        plain = lm.generate(prompt, TOKENS, draft="none", do_sample=True, seed=seed).tokens
        assert lm.generate(prompt, TOKENS, draft=draft, do_sample=True, seed=seed).tokens == plain


def test_answers_written_together_are_those_written_alone(lm: LanguageModelWithSpeculator) -> None:
    together = base_model.answer(lm.base, PROMPTS, TOKENS)
    assert together == [lm.generate(prompt, TOKENS, draft="none").tokens for prompt in PROMPTS]

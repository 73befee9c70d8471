"""A base as it is loaded: its states, its logits, its arithmetic and its stop tokens."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from spec import base as base_model
from spec.base import Base, BaseError, load, stop_ids, unstopped_turn
from spec.config import Model
from tests.tiny import HIDDEN_SIZE, VOCAB_SIZE, with_instructions

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda out: 50 * (out / 50).tanh(), id="a weak cap"),
        pytest.param(lambda out: 1.02 * out, id="a scale"),
        pytest.param(lambda out: out + 0.2 * torch.linspace(-1, 1, out.shape[-1]).to(out), id="a bias"),
    ],
)
def test_logits_that_are_more_than_lm_head_times_the_state_are_told(
    bases: dict[str, Base], change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    rows = [np.random.default_rng(seed).integers(3, 290, 40).astype(np.int32) for seed in range(4)]
    for base in bases.values():
        plain = replace(base, model=copy.deepcopy(base.model).to(dtype))
        assert base_model.has_linear_logits(plain, rows)
        plain.model.get_output_embeddings().register_forward_hook(lambda module, args, out: change(out))
        assert not base_model.has_linear_logits(plain, rows)


def test_shapes_are_those_of_lm_head_not_of_the_tokenizer(base: Base) -> None:
    assert (base.vocab_size, base.hidden_size) == (VOCAB_SIZE, HIDDEN_SIZE)
    assert len(base.tokenizer) < base.vocab_size
    assert base.lm_head.shape == base.embedding.shape == (VOCAB_SIZE, HIDDEN_SIZE)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.parametrize(("model", "tokenizer", "stops"), [(5, 2, {2, 5}), ([5, 6], None, {5, 6}), (None, 2, {2})])
def test_stop_tokens_of_model_and_tokenizer(base: Base, model: Any, tokenizer: Any, stops: set[int]) -> None:
    class Stub:
        generation_config = type("G", (), {"eos_token_id": model})
        eos_token_id = tokenizer

    assert replace(base, model=Stub(), tokenizer=Stub()).stop_ids == stops


def test_weights_are_the_same_in_any_arithmetic(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_instructions(monkeypatch, "avx512_bf16")
    narrow = load(Model(), base_folder, "digest", CPU)
    assert not caplog.messages
    with_instructions(monkeypatch)
    wide = load(Model(), base_folder, "digest", CPU)
    assert (narrow.model.dtype, wide.model.dtype) == (torch.bfloat16, torch.float32)
    assert narrow.dtype == wide.dtype == torch.bfloat16
    for mine, theirs in zip(narrow.model.parameters(), wide.model.parameters(), strict=True):
        assert torch.equal(mine.float(), theirs)
    assert caplog.messages == ["this CPU has no instructions for bfloat16: the base computes in float32"]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    assert wide.producer == {**versions, "device": "cpu", "arithmetic": "float32"}
    assert narrow.producer == {**wide.producer, "arithmetic": "bfloat16"}


@pytest.mark.parametrize(
    ("equal", "change", "words"),
    [
        (torch.equal, lambda real, model, ids: real(model, ids) * 2, "GPT2LMHeadModel does not read the model's last"),
        (lambda *_: True, lambda real, model, ids: real(model, ids.flip(1)), "lets tokens see those that come after"),
    ],
)
def test_a_model_with_other_states_is_refused(base_folder: Path, equal: Any, change: Any, words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spec.base.loading.hidden_states", partial(change, base_model.hidden_states))
        patch.setattr("torch.equal", equal)
        with pytest.raises(BaseError, match=words):
            load(Model(), base_folder, "digest", CPU)


def test_a_broken_generation_config_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(BaseError, match=r"generation_config.json cannot be read"):
        stop_ids(folder)


def test_the_token_that_closes_a_turn_ends_answers(folder: Path) -> None:
    """Where neither generation_config.json nor the tokenizer names it."""
    assert unstopped_turn(folder) is None
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"'))
    assert unstopped_turn(folder) == 2
    assert stop_ids(folder) == load(Model(), folder, "digest", CPU).stop_ids == {0, 2}

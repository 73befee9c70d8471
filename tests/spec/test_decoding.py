import functools
import itertools
import math
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MambaConfig,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spec import acceptance, lookup
from spec.base import Base, BaseError, answer, hidden_states, identify
from spec.config import Decode
from spec.decoding import DecodingError, LanguageModelWithSpeculator, probabilities
from spec.drafting import Source
from spec.heads import CheckpointError, Speculator, SpeculatorConfig, build, save
from tests.spec.heads.reference import config
from tests.tiny import generate

V, D = 12, 16
CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"pad_token_id": None}  # its embedding would be zero, and the logits behind it equal
SHARED, SLIDING = {"intermediate_size": 32, "num_key_value_heads": 1}, {"sliding_window": 6}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 32, "max_position_embeddings": 256},
    "gpt2": {"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None},
    "qwen2": {**SHARED, "tie_word_embeddings": True},
    "mistral": {**SHARED, **SLIDING},
    "gemma2": {**SHARED, **SLIDING, "head_dim": 8, "final_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},
}
SOURCES: tuple[Source, ...] = ("head", "ngram", "lookup", "hybrid")
prompts = st.lists(st.integers(0, V - 1), min_size=1, max_size=24)
rows_of_logits = st.lists(st.integers(-64, 64), min_size=2, max_size=9, unique=True)


@functools.cache
def earlier(kind: str = "llama", seed: int = 0) -> lookup.Lookup:
    """An index of a few answers that a tiny base has written."""
    answers = [plain(with_stops(tiny(kind, seed)), [first, 3], 40) for first in range(5)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / lookup.FILE
        return lookup.Lookup.open(path, lookup.write(path, answers, 1.0))


# derandomize: models in float32 whose answers are compared token for token; now and then random ones have a near tie.


@lru_cache
def tiny(kind: str = "llama", seed: int = 0) -> Base:
    """A random model. Its weights are large enough for its answers to be varied, small enough for some to loop."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **SHAPE, **KINDS[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(12)
    return with_stops(Base(model, None, "digest", CPU, torch.float32))


def with_stops(base: Base, stops: Sequence[int] = ()) -> Base:
    """The same model, ending answers at these tokens."""
    base.model.generation_config.eos_token_id = list(stops)
    base.model.generation_config.pad_token_id = 0
    return Base(base.model, SimpleNamespace(pad_token_id=0, eos_token_id=None), base.digest, base.device, base.dtype)


def speculator_config(n: int = 3, method: str = "sum_rnn", **changed: Any) -> SpeculatorConfig:
    return config(method, n_predict=n, **({"hidden_size": D, "vocab_size": V} | changed))


@lru_cache
def head(base: str, seed: int, method: str, n: int) -> Speculator:
    model = tiny(base, seed).model
    made = build(speculator_config(n, method))
    tables = {"embedding": model.get_input_embeddings().weight, "lm_head": model.get_output_embeddings().weight}
    made.initialise(tables, seed)
    return made


def plain(base: Base, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    return LanguageModelWithSpeculator(base).generate(prompt, max_new_tokens, draft="none").tokens


@settings(max_examples=80, derandomize=True)
@given(
    kind=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 2),
    method=st.sampled_from(["sum_rnn", "sum_lstm"]),
    source=st.sampled_from(SOURCES),
    n=st.integers(1, 5),
    prompt=prompts,
    max_new_tokens=st.integers(1, 32),
    stop=st.none() | st.integers(0, 31),
)
def test_speculative_greedy_is_plain_greedy(
    kind: str, seed: int, method: str, source: Source, n: int, prompt: list[int], max_new_tokens: int, stop: int | None
) -> None:
    index, base = earlier(kind, seed), tiny(kind, seed)
    expected = plain(with_stops(base), prompt, max_new_tokens)
    if stop is not None:  # a token of the answer, and so in the middle of a run where drafts are accepted
        base = with_stops(base, [expected[stop % len(expected)]])
        expected = expected[: expected.index(expected[stop % len(expected)]) + 1]
        assert plain(base, prompt, max_new_tokens) == expected
    decode = Decode(draft=source, ngram_min=1, ngram_max=3)
    model = LanguageModelWithSpeculator(base, head(kind, seed, method, n), decode, index)
    made = model.generate(prompt, max_new_tokens)
    assert made.tokens == expected
    assert generate(base, prompt, max_new_tokens) == expected
    assert sum(a + 1 for a in made.accepted) - (len(expected) - 1) in (0, 1), "the last token may be a draft"


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_training_data(kind: str) -> None:
    base = tiny(kind)
    prompt = [3, 1, 4, 1, 5]
    lm = LanguageModelWithSpeculator(base, head(kind, 0, "sum_rnn", 3))
    assert [lm.generate(prompt, 20).tokens] == answer(base, [prompt], 20)


def test_loops_are_foreseen_by_n_grams() -> None:
    base = with_stops(markov([1, 2, 3, 4, 0]))
    lm = LanguageModelWithSpeculator(base, decode=Decode(draft="ngram", draft_len=6))
    made = lm.generate([0, 1, 2, 3, 4, 0, 1], 29)
    assert made.tokens == [i % 5 for i in range(2, 31)]
    assert made.drafted == made.accepted == [6, 6, 6, 6]
    assert made.tokens_per_step == 7
    assert made.acceptance_rates == [1.0] * 6
    lm = LanguageModelWithSpeculator(with_stops(base, [3, 4]), decode=Decode(draft="ngram", draft_len=6))
    made = lm.generate([0, 1, 2, 3, 4, 0], 20)
    assert (made.tokens, made.drafted, made.accepted) == ([1, 2, 3], [6], [2]), "a stop token inside an accepted run"
    assert lm.generate([0, 1, 2], 20).tokens == [3], "the first token may be the last"


def test_figures_of_a_generation() -> None:
    base = with_stops(tiny())
    lm = LanguageModelWithSpeculator(base, head("llama", 0, "sum_rnn", 3))
    made = lm.generate([1, 2], 31)
    assert len(made.tokens) == 31
    assert made.tokens_per_step == 1 + sum(made.accepted) / len(made.drafted)
    assert made.tokens_per_second == 31 / (made.prefill_seconds + made.decode_seconds)
    greedy = lm.generate([1, 2], 31, draft="none")
    assert (len(greedy.accepted), greedy.tokens_per_step, greedy.acceptance_rates) == (30, 1.0, [])
    assert lm.generate([1, 2], 1).tokens_per_step == 1.0
    given = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    assert lm.generate(**given, max_new_tokens=31).tokens == made.tokens  # what a tokenizer gives
    for stop in ([made.tokens[9]], made.tokens[9]):
        cut = made.tokens[: made.tokens.index(made.tokens[9]) + 1]
        assert lm.generate([1, 2], 31, eos_token_id=stop).tokens == cut


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm"])
@torch.inference_mode()
def test_the_walk_on_paper_is_the_real_loop(method: str, source: Source) -> None:
    for seed, stop in itertools.product(range(3), (False, True)):
        index, base = earlier(seed=seed), with_stops(tiny("llama", seed))
        speculator = head("llama", seed, method, 3)
        decode = Decode(draft=source, ngram_min=1, ngram_max=3)
        prompt = [2, 7, 1, 8, 2, 8]
        if stop:
            base = with_stops(base, [plain(base, prompt, 30)[20]])
        model = LanguageModelWithSpeculator(base, speculator, decode, index)
        made = model.generate(prompt, 30)
        ids = torch.tensor(prompt + made.tokens)
        states = hidden_states(base.model, ids[None])[0, len(prompt) - 1 : -1]
        on_paper = acceptance.draft_answer(
            acceptance.Answer(ids.numpy().astype(np.int32), len(prompt), 0),
            model.sources[source],
            functools.partial(speculator.draft, states, ids[len(prompt) :]),
        )
        assert made.accepted == acceptance.walk(on_paper.matches, on_paper.length).tolist()


class Embedded(nn.Embedding):
    """A decoder whose states are the embedded tokens."""

    def forward(self, ids: Tensor) -> SimpleNamespace:  # type: ignore[override]
        return SimpleNamespace(last_hidden_state=super().forward(ids))


class Markov(nn.Module):
    """A causal LM whose logits depend on the last token alone; fast enough for many draws."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=1)  # for the cache, which stays empty
        self.generation_config = SimpleNamespace()
        self.decoder = Embedded.from_pretrained(torch.eye(len(logits)))
        self.lm_head = nn.Linear(len(logits), len(logits), bias=False)
        self.lm_head.weight.data.copy_(logits.T)
        self._is_stateful = False

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def forward(self, input_ids: Tensor, logits_to_keep: int, **_: object) -> SimpleNamespace:
        states = self.decoder(input_ids).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(states[:, -logits_to_keep:]))


def markov(following: Sequence[int]) -> Base:
    """Follows each token with one other."""
    logits = torch.eye(len(following))[list(following)]
    return Base(Markov(logits), None, "digest", CPU, torch.float32)


@pytest.mark.parametrize("settings_", [{}, {"temperature": 0.6, "top_k": 4, "top_p": 0.85}])
def test_sampled_sequences_have_the_distribution_of_the_base(settings_: dict[str, Any]) -> None:
    """Chi-square against the exact probability of each of the 125 sequences of three tokens; no draft changes one."""
    draws, length, start = 4000, 3, 0
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    base = with_stops(Base(Markov(logits), None, "digest", CPU, torch.float32))
    lm = LanguageModelWithSpeculator(base)
    transition = probabilities(logits, **settings_).double()
    expected = {
        sequence: draws
        * float(torch.stack([transition[a, b] for a, b in itertools.pairwise((start, *sequence))]).prod())
        for sequence in itertools.product(range(5), repeat=length)
    }
    observed = dict.fromkeys(expected, 0)
    asked: dict[str, Any] = {"draft": "none", "do_sample": True}
    assert len({tuple(lm.generate([start], 40, **asked).tokens) for _ in range(3)}) == 3  # without a seed
    for seed in range(draws):
        observed[tuple(lm.generate([start], length, seed=seed, **asked, **settings_).tokens)] += 1  # type: ignore[index]
    assert all(observed[s] == 0 for s, e in expected.items() if e == 0)
    # Sequences that are rare are counted together, as the approximation by chi-square needs it.
    common = [s for s, e in expected.items() if e >= 5]
    cells = [(observed[s], expected[s]) for s in common]
    rest = draws - sum(e for _, e in cells)
    if rest >= 5:
        cells.append((draws - sum(o for o, _ in cells), rest))
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    freedom = len(cells) - 1
    assert statistic < freedom + 3.1 * math.sqrt(2 * freedom)  # p = 0.001


@settings(max_examples=40, derandomize=True)
@given(
    kind=st.sampled_from(["llama", "gpt2"]),
    source=st.sampled_from(SOURCES),
    prompt=prompts,
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    top_p=st.sampled_from([0.45, 0.9, 1.0]),
)
def test_a_seed_gives_one_answer_whatever_is_drafted(
    kind: str, source: Source, prompt: list[int], seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    index, base = earlier(kind, 1), with_stops(tiny(kind, 1), [5])
    lm = LanguageModelWithSpeculator(base, head(kind, 1, "sum_rnn", 4), Decode(ngram_min=1), index)
    asked: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    asked |= {"seed": seed, "max_new_tokens": 20}
    expected = lm.generate(prompt, draft="none", **asked).tokens
    assert lm.generate(prompt, draft=source, **asked).tokens == expected
    if top_k == 1:
        assert expected == plain(base, prompt, 20)


@given(rows_of_logits, st.sampled_from([0.3, 1.0, 2.0]), st.integers(0, 10), st.floats(0.05, 1.0))
def test_probabilities_are_those_of_transformers(row: list[int], temperature: float, k: int, p: float) -> None:
    logits = torch.tensor([row]) / 8
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if k:
        expected = TopKLogitsWarper(k)(None, expected)
    cumulative = expected.softmax(-1).sort(descending=True).values.cumsum(-1)
    assume(not (cumulative - p).abs().lt(1e-5).any())  # on the edge rounding decides
    if p < 1:
        expected = TopPLogitsWarper(p)(None, expected)
    torch.testing.assert_close(probabilities(logits, temperature, k, p), expected.softmax(-1))


def test_a_streamer_and_a_stream_are_given_every_token_as_it_comes() -> None:
    lm = LanguageModelWithSpeculator(with_stops(tiny()), head("llama", 0, "sum_rnn", 3))
    recorder = mock.Mock()
    made = lm.generate(torch.tensor([[1, 2]]), 20, streamer=recorder)
    prompt, *shown = (call.args[0].flatten().tolist() for call in recorder.put.call_args_list)
    assert prompt == [1, 2]
    assert shown == [step.tokens for step in lm.stream([1, 2], 20)]
    assert [token for tokens in shown for token in tokens] == made.tokens
    recorder.end.assert_called_once()


def test_streams_of_one_model_do_not_disturb_each_other_and_leave_no_hook() -> None:
    base = with_stops(tiny())
    lm = LanguageModelWithSpeculator(base, head("llama", 0, "sum_rnn", 3))
    expected = [lm.generate(prompt, 20) for prompt in ([1, 2], [5])]
    first, second = lm.stream([1, 2], 20), lm.stream([5], 20)
    pairs = list(itertools.zip_longest(first, second))
    for made, steps in zip(expected, zip(*pairs, strict=True), strict=True):
        assert [step.accepted for step in steps if step][1:] == made.accepted
        assert [token for step in steps if step for token in step.tokens] == made.tokens
    abandoned = lm.stream([1, 2], 20)
    next(abandoned)
    del abandoned
    assert not base.model.get_output_embeddings()._forward_pre_hooks


def test_an_answer_ends_where_the_base_has_no_more_positions() -> None:
    base = with_stops(tiny("gpt2"))
    lm = LanguageModelWithSpeculator(base, decode=Decode(draft="ngram", ngram_min=1))
    prompt = [1, 2, 3] * 20
    assert lm.generate(prompt, 50).tokens == plain(base, prompt, 50) == generate(base, prompt, 5)
    assert len(lm.generate([1] * 64, 50).tokens) == 1
    with pytest.raises(DecodingError, match=r"65 tokens.*64 positions"):
        lm.generate([1] * 65, 1)


def test_bad_requests_are_refused() -> None:
    base = with_stops(tiny())
    lm = LanguageModelWithSpeculator(base, head("llama", 0, "sum_rnn", 3))
    requests: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "empty"),
        (torch.empty(1, 0, dtype=torch.long), {}, "empty"),
        (torch.ones(2, 3, dtype=torch.long), {}, r"\[2, 3\]"),
        ([0, 1], {"attention_mask": torch.tensor([[0, 1]])}, "padding"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        *(
            ([1], {"do_sample": True, name: bad}, "temperature")
            for name, bad in (("temperature", 0.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1))
        ),
    ]
    for ids, options, words in requests:
        with pytest.raises(DecodingError, match=words):
            lm.generate(ids, **options)
    with pytest.raises(DecodingError, match="no speculator"):
        LanguageModelWithSpeculator(base).stream([1])
    with pytest.raises(DecodingError, match="draft_len is 4"):
        LanguageModelWithSpeculator(base, lm.speculator, Decode(draft="head", draft_len=4)).stream([1])
    with pytest.raises(CheckpointError, match="vocab_size"):
        LanguageModelWithSpeculator(base, build(speculator_config(vocab_size=V + 1)))


def test_a_model_that_cannot_forget_decodes_without_drafts() -> None:
    config = MambaConfig(vocab_size=V, hidden_size=D, state_size=4, num_hidden_layers=1)
    base = with_stops(Base(AutoModelForCausalLM.from_config(config), None, "digest", CPU, torch.float32))
    lm = LanguageModelWithSpeculator(base)
    with pytest.raises(DecodingError, match=r"MambaForCausalLM.*rejected drafts"):
        lm.generate([1, 2], 8, draft="ngram")
    assert lm.generate([1, 2], 8, draft="none").tokens == generate(base, [1, 2], 8)


def test_from_pretrained_loads_the_base_that_the_checkpoint_names(tmp_path: Path) -> None:
    base = with_stops(tiny(), [0])
    base.model.save_pretrained(tmp_path / "base")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained(tmp_path / "base")
    trained = head("llama", 0, "sum_rnn", 3)
    digest = identify(tmp_path / "base")["weights"]
    named = build(speculator_config(base_model_name_or_path=str(tmp_path / "base"), base_digest=digest))
    named.load_state_dict(trained.state_dict())
    save(named, tmp_path / "speculator")

    lm = LanguageModelWithSpeculator.from_pretrained(tmp_path / "speculator", dtype="float32", device="cpu")
    expected = LanguageModelWithSpeculator(base, trained).generate([1, 2], 20)
    made = lm.generate([1, 2], 20)
    assert (made.tokens, made.accepted) == (expected.tokens, expected.accepted)
    assert lm.base.stop_ids == {0}
    rounded = LanguageModelWithSpeculator.from_pretrained(tmp_path / "speculator", device="cpu")
    assert rounded.base.dtype == torch.bfloat16
    assert rounded.base.lm_head.dtype == next(iter(rounded.speculator.parameters())).dtype  # type: ignore[union-attr]

    other = build(speculator_config(base_model_name_or_path=str(tmp_path / "base"), base_digest="another"))
    other.load_state_dict(trained.state_dict())
    save(other, tmp_path / "other")
    with pytest.raises(CheckpointError, match="another"):
        LanguageModelWithSpeculator.from_pretrained(tmp_path / "other", device="cpu")
    LanguageModelWithSpeculator.from_pretrained(tmp_path / "other", device="cpu", allow_other_weights=True)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(BaseError, match="name it with --base"):
        LanguageModelWithSpeculator.from_pretrained(tmp_path / "speculator", device="cpu")
    LanguageModelWithSpeculator.from_pretrained(tmp_path / "speculator", device="cpu", base=tmp_path / "moved")

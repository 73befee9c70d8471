"""The proposer alone, in vLLM's place: rows of the batch, requests that come, wait and go, and what it refuses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from spec import heads
from spec.config import Decode
from spec.drafting import Drafter, Sources, complete
from spec.heads import CheckpointError
from spec.serving import ServingError
from spec.serving import vllm as serving
from tests.spec.export import engines
from tests.spec.heads.reference import config as speculator_config

D, V, LONGEST = 8, 24, 64
SHAPES: dict[str, dict[str, Any]] = {
    "sum_rnn": {},
    "scaled": {"scale_input": True},
    "untied": {"tie_weights": False},
    "draft vocabulary": {"draft_vocab_size": 10},
    "stacks": {"inner_dim": (8, 16), "emb_dim": (8, 16), "proj_dim": (8, 16)},
    "sum_lstm": {"method": "sum_lstm"},
    "sum_lstm, one table": {"method": "sum_lstm", "tie_lstm_embs": True},
    "sum_lstm, stacks": {"method": "sum_lstm", "inner_dim": (8, 16), "emb_dim": (8, 16), "proj_dim": (8, 16)},
}


def make(folder: Path, **shape: Any) -> Path:
    """A random speculator of three heads."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        engines.checkpoint(folder, speculator_config(**{"hidden_size": D, "vocab_size": V, **shape}))
    return folder


def config(checkpoint: Path | None, limit: int = 3, vocab_size: int = V, hidden_size: int = D, **options: Any) -> Any:
    """What the proposer reads of a VllmConfig."""
    named = {} if checkpoint is None else {"checkpoint": str(checkpoint)}
    return SimpleNamespace(
        additional_config={"speculator": {**named, **options}},
        speculative_config=SimpleNamespace(num_speculative_tokens=limit),
        model_config=SimpleNamespace(
            max_model_len=LONGEST,
            dtype=torch.float32,
            get_vocab_size=lambda: vocab_size,
            get_hidden_size=lambda: hidden_size,
        ),
    )


def proposer(checkpoint: Path, limit: int = 3, **options: Any) -> serving.SpeculatorProposer:
    made = serving.SpeculatorProposer(config(checkpoint, limit, **options))
    made.load_model(torch.nn.Linear(1, 1))
    return made


def propose(
    made: serving.SpeculatorProposer,
    requests: Sequence[str],
    tokens: Sequence[Sequence[int]],
    sampled: Sequence[Sequence[int]],
    states: torch.Tensor,
    drafted: Sequence[int] | None = None,
) -> list[list[int]]:
    """One step of vLLM's."""
    table = np.zeros((len(requests), LONGEST), np.int32)
    for row, ids in zip(table, tokens, strict=True):
        row[: len(ids)] = ids
    made.verified = serving.Verified(states, drafted, requests)
    return made.propose(sampled, np.array([len(ids) for ids in tokens], np.int32), table)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make(tmp_path / "speculator")


@pytest.mark.parametrize("name", SHAPES)
def test_heads_of_every_method_draft_from_the_state_behind_the_last_token(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "s", **SHAPES[name])
    # a had 3 drafts and 1 accepted, b none (its prompt is read in parts), c 2 and 2 accepted, d none drafted.
    sampled = [[5, 6], [], [7, 8, 9], [4]]
    drafted = [3, 0, 2, 0]
    states = torch.randn(4 + 1 + 3 + 1, D, generator=torch.Generator().manual_seed(1))
    tokens = [[1, 2, 5, 6], [3, 3], [7, 8, 9], [2, 4]]
    found = propose(proposer(folder, draft="head"), "abcd", tokens, sampled, states, drafted)
    wanted = heads.load(folder).eval().draft(states[[1, 7, 8]], torch.tensor([6, 9, 4])).tolist()
    assert found == [wanted[0], [], wanted[1], wanted[2]]
    assert len({tuple(row) for row in wanted}) > 1
    # At most two tokens a step, and a batch in which no request had drafts.
    found = propose(proposer(folder, 2, draft="head"), "ab", [[1, 6], [2, 9]], [[6], [9]], states[[1, 7]])
    assert found == [row[:2] for row in wanted[:2]]


def drafted(sources: Sources, ids: list[int], speculator: Any = None, state: Any = None) -> list[int]:
    """What decoding drafts after these tokens, at most 8."""
    drafter = Drafter(sources)
    drafter.extend(ids)
    draft = drafter.draft(8)
    complete([draft], None if state is None else functools.partial(speculator.draft, state, torch.tensor(ids[-1:])))
    return draft.tokens


def test_hybrid_drafts_as_decoding_does(checkpoint: Path) -> None:
    decode = Decode(draft="hybrid", token_cost=1e-3)  # random heads are hardly worth more
    made = proposer(checkpoint, 8, draft="hybrid", token_cost=1e-3)
    tokens = {"loop": [1, 2, 3, 4, 1, 2, 3], "new": [9, 8, 7, 6]}
    states = torch.randn(2, D, generator=torch.Generator().manual_seed(3))
    found = propose(made, list(tokens), list(tokens.values()), [[3], [6]], states)
    speculator = heads.load(checkpoint)
    for i, (ids, draft) in enumerate(zip(tokens.values(), found, strict=True)):
        assert draft == drafted(Sources(decode, "hybrid", speculator.config), ids, speculator, states[i : i + 1])
    assert found[0][:4] == [4, 1, 2, 3]  # looked up
    assert found[1][:3] == speculator.draft(states[1:], torch.tensor([6]))[0].tolist()  # from the heads


def test_ngrams_see_what_was_written_in_steps_without_a_draft(checkpoint: Path) -> None:
    made = proposer(checkpoint, 8, draft="ngram")
    states = torch.zeros(1, D)
    assert propose(made, "a", [[1, 2, 3]], [[3]], states) == [[]]
    # vLLM skips the proposer in some steps; the tokens of these are not in `sampled`.
    ids = [1, 2, 3, 4, 5, 1, 2]
    (found,) = propose(made, "a", [ids], [[2]], states)
    assert found
    assert found == drafted(Sources(Decode(), "ngram"), ids)


def test_requests_that_move_end_or_come_back_keep_their_own_tokens(checkpoint: Path) -> None:
    made = proposer(checkpoint, 8, draft="ngram")
    states = torch.zeros(2, D)
    a, b = [1, 2, 3, 1, 2], [7, 8, 9, 7, 8]
    first = propose(made, "ab", [a, b], [[2], [8]], states)
    assert first[0][0] == 3
    assert first[1][0] == 9
    # a has ended or waits, b takes its place in the batch.
    assert propose(made, "b", [[*b, 9]], [[9]], states[:1])[0][0] == 7
    assert set(made._drafters) == {"b"}
    # Another request by a's name, shorter than a was.
    assert propose(made, "ba", [[*b, 9, 7], [4, 5, 4]], [[7], [4]], states)[1][0] == 5


def test_nothing_is_drafted_beyond_the_maximal_length(checkpoint: Path) -> None:
    for left, drafts in ((4, 3), (3, 2), (2, 1), (1, 0), (0, 0)):
        ids = [1] * (LONGEST - left)
        (found,) = propose(proposer(checkpoint, draft="head"), "a", [ids], [[1]], torch.zeros(1, D))
        assert len(found) == drafts, left


@pytest.mark.parametrize("drafted", [None, [2, 0], [1, 1, 0]])
def test_states_that_do_not_fit_the_batch_are_refused(checkpoint: Path, drafted: list[int] | None) -> None:
    with pytest.raises(ServingError, match=r"is not as spec/serving/vllm.py expects it .*5 hidden states"):
        propose(proposer(checkpoint), "ab", [[1, 5], [2, 6]], [[5], [6]], torch.zeros(5, D), drafted)


def test_a_step_whose_states_are_not_handed_over_is_refused(checkpoint: Path) -> None:
    made = proposer(checkpoint)
    propose(made, "a", [[1, 5]], [[5]], torch.zeros(1, D))
    with pytest.raises(ServingError, match="without the step's hidden states"):
        made.propose([[6]], np.array([3], np.int32), np.zeros((1, LONGEST), np.int32))


def test_the_runner_hands_over_what_it_has(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def original(self: Any, scheduler_output: Any, sample_hidden_states: Any, spec_decode_metadata: Any) -> str:
        seen.append(getattr(self.drafter, "verified", None))
        return "drafts"

    monkeypatch.setattr(GPUModelRunner, "propose_draft_token_ids", original)
    made = proposer(checkpoint)
    proposer(checkpoint)  # a second one wraps nothing twice
    states = torch.zeros(3, D)
    for drafter, metadata in ((made, SimpleNamespace(num_draft_tokens=[1, 0])), (made, None), (object(), None)):
        runner = SimpleNamespace(drafter=drafter, input_batch=SimpleNamespace(req_ids=["a", "b"]))
        assert GPUModelRunner.propose_draft_token_ids(runner, None, states, metadata) == "drafts"
    assert seen == [
        serving.Verified(states, [1, 0], ["a", "b"]),
        serving.Verified(states, None, ["a", "b"]),
        None,  # another proposer is left alone
    ]


def test_another_vllm_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: Any, scheduler_output: Any, states: Any) -> None: ...

    monkeypatch.setattr(GPUModelRunner, "propose_draft_token_ids", other)
    monkeypatch.setattr(serving.vllm, "__version__", "9.1.0")
    with pytest.raises(ServingError, match=r"vLLM 9.1.0 is not as .*sample_hidden_states.*install vllm 0.32"):
        proposer(checkpoint)
    monkeypatch.delattr(GPUModelRunner, "propose_draft_token_ids")
    with pytest.raises(ServingError, match=r"install vllm 0\.32"):
        proposer(checkpoint)


def test_an_untested_vllm_is_warned_of(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def same(self: Any, sample_hidden_states: Any, spec_decode_metadata: Any) -> None: ...

    monkeypatch.setattr(GPUModelRunner, "propose_draft_token_ids", same)
    monkeypatch.setattr(serving.vllm, "__version__", "0.33.0")
    warned: list[str] = []
    monkeypatch.setattr(serving.log, "warning", warned.append)
    proposer(checkpoint)
    assert warned == ["vLLM 0.33.0: speculators were tested with 0.32.* only"]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"limit": 4, "draft": "head"}, ServingError, "num_speculative_tokens is 4.*n_predict 3"),
        ({"hidden_size": D + 1}, CheckpointError, f"hidden_size.*{D}.*{D + 1}"),
        ({"vocab_size": V + 1}, CheckpointError, f"vocab_size.*{V}.*{V + 1}"),
        ({"draft": "heads"}, ServingError, "additional_config.speculator.*draft"),
        ({"ngram": 3}, ServingError, "additional_config.speculator.*ngram"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_loaded(
    checkpoint: Path, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        serving.SpeculatorProposer(config(checkpoint, **changed))


def test_a_checkpoint_that_is_not_named_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="names no checkpoint: pass --additional-config"):
        serving.SpeculatorProposer(config(None))
    with pytest.raises(ServingError, match=r"additional_config.speculator.checkpoint: .*missing"):
        serving.SpeculatorProposer(config(tmp_path / "nowhere"))

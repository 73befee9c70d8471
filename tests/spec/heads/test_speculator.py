"""All methods against the reference, and what they share."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spec.heads import Speculator, SpeculatorConfig, SumRnn, build, fuse, init_random
from spec.heads.layers import RMSNorm
from spec.heads.speculator import mixing_weight

from . import reference
from .reference import config, inputs

METHODS = ["sum_rnn", "sum_lstm"]
width = st.sampled_from([4, 6, 8])
stacks = st.just(()) | st.tuples(width) | st.tuples(width, width)


@st.composite
def configs(draw: st.DrawFn) -> SpeculatorConfig:
    method = draw(st.sampled_from(METHODS))
    w = (draw(st.sampled_from([4, 8, 10])),)
    return config(
        method,
        n_predict=draw(st.integers(1, 4)),
        inner_dim=draw(st.just(w) | st.tuples(width) | st.tuples(width, width)),
        emb_dim=draw(stacks) + w,
        proj_dim=draw(stacks) + w,
        scale_input=draw(st.booleans()),
        tie_weights=method == "sum_lstm" or draw(st.booleans()),
        tie_lstm_embs=draw(st.booleans()),
    )


def randomized(c: SpeculatorConfig, token_map: torch.Tensor | None = None) -> Speculator:
    """Every parameter away from its special value: norms too."""
    speculator = build(c, token_map)
    with torch.no_grad():
        for module in speculator.modules():
            for parameter in module.parameters(recurse=False):
                parameter.normal_(1.0 if isinstance(module, RMSNorm) and parameter is module.weight else 0.0, 0.5)
    return speculator


@settings(max_examples=80)
@given(c=configs())
def test_every_option_follows_the_formulas(c: SpeculatorConfig) -> None:
    speculator = randomized(c)
    states, tokens = inputs(c, positions=2)
    expected = reference.logits(c, speculator.state_dict(), states, tokens)
    torch.testing.assert_close(speculator(states, tokens), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=40)
@given(c=configs(), n=st.integers(1, 4), fused=st.booleans())
def test_a_draft_is_the_chain_of_argmaxes(c: SpeculatorConfig, n: int, fused: bool) -> None:
    n = min(n, c.n_predict)
    speculator = randomized(c)
    states, tokens = inputs(c)
    fed = tokens[:, :1]
    for i in range(n):  # the drafts so far are the inputs of a teacher-forced pass
        padded = torch.cat([fed, tokens[:, len(fed[0]) :]], 1)
        fed = torch.cat([fed, speculator(states, padded)[i].argmax(-1, keepdim=True)], 1)
    drafter = fuse(speculator) if fused else speculator
    assert torch.equal(drafter.draft(states, tokens[:, 0], n), fed[:, 1:])


def test_a_draft_has_all_heads_by_default_and_never_more() -> None:
    c = config()
    speculator, (states, tokens) = randomized(c), inputs(c)
    drafts = speculator.draft(states, tokens[:, 0])
    assert drafts.shape == (5, 3)
    assert drafts.dtype == torch.int64
    assert torch.equal(speculator.draft(states, tokens[:, 0], 2), drafts[:, :2])
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"asked for {n} drafts.* n_predict = 3"):
            speculator.draft(states, tokens[:, 0], n)


def test_forward_wants_a_token_for_every_head() -> None:
    c = config()
    states, tokens = inputs(c)
    with pytest.raises(ValueError, match="2 columns, expected n_predict = 3"):
        build(c)(states, tokens[:, :2])


@pytest.mark.parametrize("method", METHODS)
def test_states_are_cast_to_the_weights(method: str) -> None:
    c = config(method)
    speculator, (states, tokens) = randomized(c), inputs(c)
    half = states.to(torch.bfloat16)
    assert torch.equal(speculator(half, tokens), speculator(half.float(), tokens))
    assert speculator.to(torch.bfloat16)(states, tokens).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm"])
def test_head_i_reads_the_token_before_the_one_it_predicts(method: str) -> None:
    """In the language where v is followed by v + 1, heads that only look at their token predict x_{t+2+i} exactly."""
    V = 10
    c = config(method, hidden_size=4, vocab_size=V, inner_dim=(V,), emb_dim=(V,), proj_dim=(V,))
    speculator = build(c)
    with torch.no_grad():
        for name, parameter in speculator.named_parameters():
            if "proj" in name:
                parameter.zero_()
            elif "emb" in name:
                parameter.copy_(torch.eye(V) * (10 if method == "sum_lstm" else 1))
            elif name == "head.0.weight":
                parameter.copy_(torch.eye(V).roll(1, 0))  # row v + 1 answers to token v
    x = (torch.arange(6)[:, None] + torch.arange(8)) % V  # six sequences of eight tokens
    t, n = 1, c.n_predict
    states = torch.randn(len(x), 4)
    logits = speculator(states, x[:, t + 1 : t + 1 + n])
    for i in range(n):
        assert torch.equal(logits[i].argmax(-1), x[:, t + 2 + i])
    assert torch.equal(speculator.draft(states, x[:, t + 1]), x[:, t + 2 : t + 2 + n])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"n_predict": 3, "emb_dim": (8,), "proj_dim": (8,)},
            (0.20629947401590020 * 8 / 2 / 0.79370052598409980) ** 0.5,
        ),
        ({"n_predict": 3, "emb_dim": (4, 8), "proj_dim": (8,)}, (0.20629947401590020 / 2 / 0.79370052598409980) ** 0.5),
        ({"n_predict": 1, "emb_dim": (8,), "proj_dim": (4, 8)}, 2.0),
        ({"n_predict": 1, "inner_dim": (32,)}, 2.0),
    ],
)
def test_mixing_weight(changes: dict[str, Any], expected: float) -> None:
    assert mixing_weight(config(**changes)) == pytest.approx(expected, rel=1e-12)


def test_an_embedding_stack_does_not_drown_the_state() -> None:
    """At random weights the state keeps more of the sum than the token, as it does with a plain table."""
    for emb in ((64,), (32, 64)):
        c = config(hidden_size=64, vocab_size=200, emb_dim=emb, proj_dim=(64,), inner_dim=(64,), scale_input=True)
        speculator = build(c)
        assert isinstance(speculator, SumRnn)
        init_random(speculator)
        states, tokens = inputs(c, positions=100)
        token = (speculator.alpha * speculator.emb(0)(tokens[:, 0])).square().mean().sqrt()
        state = speculator.proj(0)(*speculator.start(states)).square().mean().sqrt()
        assert 0.2 < token / state < 0.8


@pytest.mark.parametrize("method", METHODS)
def test_draft_vocabulary(method: str) -> None:
    kept = torch.tensor([0, 3, 4, 11, 22])
    c = config(method, draft_vocab_size=5)
    speculator = randomized(c, kept)
    states, tokens = inputs(c)
    logits = speculator(states, tokens)
    assert logits.shape == (3, 5, 5)
    drafts = speculator.draft(states, tokens[:, 0])
    assert torch.equal(drafts[:, 0], kept[logits[0].argmax(-1)])
    assert set(drafts.flatten().tolist()) <= set(kept.tolist())
    assert speculator.targets(torch.tensor([0, 1, 3, 22, 21])).tolist() == [0, -1, 1, 4, -1]
    assert torch.equal(speculator.targets(kept), torch.arange(5))
    assert "token_map" in speculator.state_dict()
    assert "draft_index" not in speculator.state_dict()


def test_a_full_vocabulary_maps_to_itself() -> None:
    tokens = torch.tensor([3, 1])
    assert torch.equal(build(config()).targets(tokens), tokens)


def test_the_index_follows_a_loaded_token_map() -> None:
    c = config(draft_vocab_size=2)
    speculator = build(c, torch.tensor([1, 2]))
    speculator.load_state_dict(build(c, torch.tensor([5, 9])).state_dict())
    assert speculator.targets(torch.tensor([1, 5, 9])).tolist() == [-1, 0, 1]


@pytest.mark.parametrize(
    ("size", "ids", "message"),
    [
        (None, [1], "token_map of 1 ids was given"),
        (3, None, "token_map of 3 ids is needed"),
        (3, [1, 2], r"shape \[2\], expected \[3\]"),
        (3, [1, 3, 2], "ascending"),
        (3, [1, 2, 2], "ascending"),
        (3, [-1, 2, 3], r"spans -1\.\.3, expected ids in 0\.\.22"),
        (3, [1, 2, 23], r"spans 1\.\.23"),
    ],
)
def test_token_maps_that_do_not_fit(size: int | None, ids: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(config(draft_vocab_size=size), None if ids is None else torch.tensor(ids))


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_pickles_are_whole(method: str) -> None:
    c = config(method, draft_vocab_size=3)
    speculator = randomized(c, torch.tensor([1, 2, 3]))
    states, tokens = inputs(c)
    for other in (copy.deepcopy(speculator), pickle.loads(pickle.dumps(speculator))):
        assert torch.equal(other(states, tokens), speculator(states, tokens))
        assert other.num_parameters() == speculator.num_parameters()
        other.load_state_dict(build(c, torch.tensor([4, 5, 6])).state_dict())
        assert other.targets(torch.tensor([4])).tolist() == [0]
        assert speculator.targets(torch.tensor([4])).tolist() == [-1]


@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm"])
@pytest.mark.parametrize("n", [1, 3])
def test_every_trained_parameter_gets_a_gradient(method: str, n: int) -> None:
    c = config(method, n_predict=n, inner_dim=(4, 8), emb_dim=(4, 8), proj_dim=(4, 8))
    speculator = build(c)
    states, tokens = inputs(c)
    speculator(states, tokens).sum().backward()
    assert all(p.grad is not None for p in speculator.parameters() if p.requires_grad)


def test_norms_and_token_tables_are_not_decayed() -> None:
    assert build(config()).undecayed() == {"ln.0.0.weight", "ln.0.0.bias", "emb.0.0.weight"}

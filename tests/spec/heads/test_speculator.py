"""All methods against the reference, and what they share."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spec.heads import LAST, Packed, SpeculatorConfig, build

from . import reference
from .reference import config, inputs, randomized

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
        draft_vocab_size=draw(st.sampled_from([None, 5])),
    )


@settings(max_examples=80)
@given(c=configs())
def test_every_option_follows_the_formulas(c: SpeculatorConfig) -> None:
    speculator = randomized(c).double()
    states, tokens = inputs(c, positions=2)
    expected = reference.logits(c, speculator.state_dict(), states.double(), tokens)
    torch.testing.assert_close(speculator(states, tokens), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(c=configs(), n=st.integers(1, 4))
def test_a_draft_is_the_chain_of_argmaxes(c: SpeculatorConfig, n: int) -> None:
    n = min(n, c.n_predict)
    speculator = randomized(c)
    states, tokens = inputs(c)
    fed, drafted = tokens[:, :1], torch.arange(23) if speculator.token_map is None else speculator.token_map
    for i in range(n):  # the drafts so far are the inputs of a teacher-forced pass
        padded = torch.cat([fed, tokens[:, len(fed[0]) :]], 1)
        fed = torch.cat([fed, drafted[speculator(states, padded)[i].argmax(-1, keepdim=True)]], 1)
    assert torch.equal(speculator.draft(states, tokens[:, 0], n), fed[:, 1:])
    assert speculator.draft(states, tokens[:, 0]).shape == (5, c.n_predict)


@settings(max_examples=40)
@given(c=configs(), lengths=st.lists(st.integers(0, 7), min_size=1, max_size=3))
def test_whole_sequences_are_as_their_positions(c: SpeculatorConfig, lengths: list[int]) -> None:
    """Unrolled and drafted along as position by position, and a session as the draft at its newest position."""
    speculator, total = randomized(c).double(), sum(lengths)
    ids, mask = torch.randint(23, (total,)), torch.rand(total) < 0.7
    packed = Packed.of(ids, mask, lengths, {})
    states = torch.randn(len(packed.starts), c.hidden_size, dtype=torch.float64)
    packed = replace(packed, states={LAST: states})
    rows = torch.randperm(len(states))[:4].sort().values
    tokens = torch.nn.functional.pad(ids, (0, 9))[packed.starts[rows, None] + torch.arange(1, c.n_predict + 1)]
    wanted = speculator(states[rows], tokens)
    for k, vectors in enumerate(speculator.unroll(packed, [rows] * c.n_predict)):
        torch.testing.assert_close(vectors @ speculator.output(k).T, wanted[k])
    drafts = speculator.draft_along(packed, rows, c.n_predict)
    assert torch.equal(drafts, speculator.draft(states[rows], ids[packed.starts[rows] + 1]))
    session = speculator.session()
    for row, draft in zip(rows.tolist(), drafts, strict=True):
        session.extend({LAST: states[: row + 1]}, ids[packed.starts[: row + 1] + 1])
        assert torch.equal(session.draft(c.n_predict), draft)
        session.crop()


@pytest.mark.parametrize("method", METHODS)
def test_states_are_cast_to_the_weights(method: str) -> None:
    c = config(method)
    speculator, (states, tokens) = randomized(c), inputs(c)
    half = states.to(torch.bfloat16)
    assert torch.equal(speculator(half, tokens), speculator(half.float(), tokens))
    assert speculator.to(torch.bfloat16)(states, tokens).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("size", "ids", "message"),
    [
        (None, [1], "token_map of 1 ids was given, but draft_vocab_size is None"),
        (3, None, "no token_map was given, but draft_vocab_size is 3"),
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
@pytest.mark.parametrize("n", [1, 3])
def test_every_trained_parameter_gets_a_gradient(method: str, n: int) -> None:
    c = config(method, n_predict=n, inner_dim=(4, 8), emb_dim=(4, 8), proj_dim=(4, 8))
    speculator = build(c)
    states, tokens = inputs(c)
    speculator(states, tokens).sum().backward()
    assert all(p.grad is not None for p in speculator.parameters() if p.requires_grad)


def test_a_plain_networks_names_and_sizes() -> None:
    """As public files have them: a head for each draft, tied or not, while tied weights count once."""
    each = ("emb.{}.0.weight", "proj.{}.0.weight", "ln.{}.0.weight", "ln.{}.0.bias", "head.{}.weight")
    untied = build(config(tie_weights=False))
    assert set(untied.state_dict()) == {name.format(i) for name in each for i in range(3)}
    tied = build(config())
    shared = {name.format(0) for name in each} | {"proj.1.0.weight", "head.1.weight", "head.2.weight"}
    assert set(tied.state_dict()) == shared
    assert tied.num_parameters() == 2 * 23 * 8 + 8 * (12 + 8) + 2 * 8
    assert untied.num_parameters() == 3 * (2 * 23 * 8 + 2 * 8) + 8 * (12 + 8 + 8)

"""The fused loss beside plain cross-entropy, value and gradients."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from spec.base import Teacher
from spec.corpus import TokenSequence
from spec.heads import LAST, Packed, Speculator, build
from spec.training import loss as loss_module
from spec.training.joint import pack
from spec.training.loss import SpeculatorLoss, linear_cross_entropy
from tests.spec.heads.reference import config
from tests.tiny import sequence

V, D = 19, 8
chunks = st.sampled_from([1, V - 1, V, 2 * V, 5 * V + 3, 7 * V, 12 * V, 1000 * V])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one not full; two rows of each of three heads that share their teachers."""
    monkeypatch.setitem(loss_module.CHUNK_LOGITS, "cpu", 7 * V)


def inputs(rows: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (rows,), generator=generator)
    return hidden, weight, targets, torch.rand(rows, generator=generator, dtype=dtype)


def test_of_equal_logits_the_first_is_the_hit_as_it_is_the_draft() -> None:
    hidden, weight = torch.ones(4, D), torch.ones(V, D)
    weight[7:] = 2  # from there on all logits are the largest
    _, _, correct = linear_cross_entropy(hidden, weight, torch.tensor([7, 8, V - 1, 0]), torch.ones(4))
    assert correct.tolist() == [True, False, False, False]


@settings(max_examples=90)
@given(st.booleans(), st.integers(0, 17), st.integers(1, 3), st.integers(0, 99), st.sampled_from([1.0, -3.5]), chunks)
def test_the_fused_loss_is_cross_entropy_or_the_divergence_from_a_teacher(
    taught: bool, teachers: int, each: int, seed: int, factor: float, chunk: int
) -> None:
    hidden, weight, targets, scale = inputs(teachers * each, seed)
    logits, teacher = hidden @ weight.T, None
    if taught:
        generator = torch.Generator().manual_seed(seed + 1)
        states, table = (torch.randn(n, D + 3, generator=generator, dtype=torch.float64) for n in (teachers, V))
        targets[::3] = -1  # written, but outside the draft vocabulary
        soft, teacher = (states @ table.T).softmax(1).repeat(each, 1), (states, Teacher(table))
        plain = F.kl_div(logits.log_softmax(1), soft, reduction="none").sum(1)
    else:
        plain = F.cross_entropy(logits, targets, reduction="none")
    expected = torch.autograd.grad((plain * scale).sum() * factor, (hidden, weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss_module.CHUNK_LOGITS, "cpu", chunk)
        total, losses, correct = linear_cross_entropy(hidden, weight, targets, scale, teacher)
    (total * factor).backward()
    torch.testing.assert_close(total, (plain * scale).sum())
    torch.testing.assert_close(losses, plain)
    assert torch.equal(correct, logits.argmax(1) == targets)
    torch.testing.assert_close((hidden.grad, weight.grad), expected)
    assert not losses.requires_grad
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets, scale, teacher)[0].requires_grad


@pytest.mark.parametrize("shift", [0.0, -40.0])
def test_a_divergence_of_nothing_is_nothing_in_float32(shift: float) -> None:
    """Over many tokens and far from zero, where sums of the logits themselves would round by more."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.cat([torch.randn(12, D, generator=generator), torch.ones(12, 1)], 1)
    weight = torch.cat([torch.randn(50_000, D, generator=generator), torch.full((50_000, 1), shift)], 1)
    _, losses, _ = linear_cross_entropy(
        hidden.repeat(3, 1), weight, torch.zeros(36, dtype=torch.long), torch.ones(36), (hidden, Teacher(weight))
    )
    assert losses.abs().max() < 4e-5


def test_logits_of_any_size_give_finite_losses() -> None:
    hidden, weight, targets, scale = inputs(9, dtype=torch.float32)
    total, losses, _ = linear_cross_entropy(hidden * 1e4, weight, targets, scale)
    total.backward()
    assert losses.isfinite().all()
    assert (losses >= 0).all()
    assert hidden.grad.isfinite().all()
    torch.testing.assert_close(losses, F.cross_entropy(hidden * 1e4 @ weight.T, targets, reduction="none"))


@pytest.mark.parametrize("taught", [False, True])
def test_mixed_precision_rounds_as_a_linear_would(taught: bool) -> None:
    hidden, weight, targets, scale = inputs(64, dtype=torch.float32)
    states, table, _, _ = inputs(32, seed=1, dtype=torch.float32)
    teacher = (states.detach(), Teacher(table.detach())) if taught else None
    exact = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, scale, teacher)[0], (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, losses, _ = linear_cross_entropy(hidden, weight, targets, scale, teacher)
        logits, soft = F.linear(hidden, weight).float(), F.linear(states, table).float().softmax(1).repeat(2, 1)
    plain = F.cross_entropy(logits, targets, reduction="none")
    if taught:
        plain = F.kl_div(logits.log_softmax(1), soft, reduction="none").sum(1)
    rounded = torch.autograd.grad(total, (hidden, weight))
    assert losses.dtype == torch.float32
    assert [grad.dtype for grad in rounded] == [torch.float32, torch.float32]
    torch.testing.assert_close(losses, plain, rtol=1e-2, atol=2e-2)
    for found, expected in zip(rounded, exact, strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()


CASES: list[tuple[str, dict[str, Any]]] = [
    ("sum_rnn", {"tie_weights": True}),
    ("sum_rnn", {"tie_weights": False}),
    ("sum_rnn", {"inner_dim": (6, 10), "emb_dim": (4, 6), "proj_dim": (6,), "scale_input": True}),
    ("sum_lstm", {"tie_lstm_embs": False}),
    ("sum_lstm", {"tie_lstm_embs": True}),
]


def make(method: Any, changed: dict[str, Any], drafted: int | None) -> Speculator:
    shape: dict[str, Any] = {"inner_dim": (6,), "emb_dim": (6,), "proj_dim": (6,)}
    c = config(method, hidden_size=D, vocab_size=V, draft_vocab_size=drafted, **(shape | changed))
    speculator = build(c, None if drafted is None else torch.arange(V)[-drafted:])
    speculator.initialise()
    return speculator.double()


def make_loss(
    speculator: Speculator, weights: Sequence[float] | None = None, lm_head: Tensor | None = None
) -> SpeculatorLoss:
    teacher = None if lm_head is None else Teacher(lm_head).over(speculator.token_map, lm_head.device, lm_head.dtype)
    return SpeculatorLoss(speculator, weights, teacher).double()


def measure(loss: SpeculatorLoss, batch: Packed, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    supervision = loss.supervise(batch)
    return loss(supervision, supervision.counts if counts is None else counts)


class Split:
    """Sequences with their states in float64, as a batch of cached sequences."""

    def __init__(self, rows: Sequence[TokenSequence], hidden: Sequence[Tensor]) -> None:
        self.rows, self.hidden = rows, hidden

    def batch(self, chosen: Sequence[int] | None = None) -> Packed:
        chosen = range(len(self.rows)) if chosen is None else chosen
        kept = [self.hidden[index][np.flatnonzero(self.rows[index].mask[1:])] for index in chosen]
        return replace(pack([self.rows[index] for index in chosen]), states={LAST: torch.cat(kept)})

    def by_hand(
        self, speculator: Speculator, weights: Sequence[float], lm_head: Tensor | None
    ) -> tuple[Tensor, list[list[float]]]:
        """The loss and each head's sums, one position and head at a time, from the sequences themselves."""
        losses: list[list[Tensor]] = [[], [], []]
        sums = [[0.0, 0, 0] for _ in range(3)]
        drafted = range(V) if speculator.token_map is None else speculator.token_map.tolist()
        for row, hidden in zip(self.rows, self.hidden, strict=True):
            ids, mask = row.ids.tolist(), row.mask.tolist()
            for t in range(len(ids) - 1):
                fed = torch.tensor([[*ids[t + 1 : t + 4], 0, 0, 0][:3]])
                logits = speculator(hidden[t, None], fed)[:, 0]
                for i in range(3):
                    span = mask[t + 1 : t + 3 + i]
                    if len(span) < 2 + i or not all(span):
                        continue
                    sums[i][2] += 1
                    target = ids[t + 2 + i]
                    if lm_head is not None:  # the base wrote the target from its state right before it
                        soft = (lm_head @ hidden[t + 1 + i])[list(drafted)].softmax(0)
                        losses[i].append(F.kl_div(logits[i].log_softmax(0), soft, reduction="sum"))
                    elif target in drafted:
                        losses[i].append(-logits[i].log_softmax(0)[drafted.index(target)])
                    sums[i][1] += drafted[int(logits[i].argmax())] == target
        means = [torch.stack(part).sum() / sums[i][2] if part else torch.zeros(()) for i, part in enumerate(losses)]
        total = sum((w * mean for w, mean in zip(weights, means, strict=True)), torch.zeros((), dtype=torch.float64))
        for i, part in enumerate(losses):
            sums[i][0] = sum(loss.item() for loss in part)
        return total / sum(weights), sums


@st.composite
def splits(draw: st.DrawFn) -> Split:
    """A few sequences with any turns."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    masks = draw(st.lists(st.lists(st.integers(0, 3).map(bool), min_size=1, max_size=12), min_size=1, max_size=4))
    rows = [sequence(list(map(int, mask)), torch.randint(V, (len(mask),), generator=generator)) for mask in masks]
    return Split(rows, [torch.randn(len(row), D, generator=generator, dtype=torch.float64) for row in rows])


def table() -> Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@settings(max_examples=60)
@given(
    split=splits(),
    case=st.sampled_from(CASES),
    drafted=st.sampled_from([None, 11]),
    weights=st.sampled_from([None, [1.0, 2.0, 3.0], [2.0, 0.5, 0.5]]),
    soft=st.booleans(),
    chunk=chunks,
)
def test_loss_and_gradients_are_those_of_one_position_after_the_other(
    split: Split,
    case: tuple[str, dict[str, Any]],
    drafted: int | None,
    weights: list[float] | None,
    soft: bool,
    chunk: int,
) -> None:
    speculator = make(*case, drafted)
    lm_head = table() if soft else None
    expected, sums = split.by_hand(speculator, weights or [1.0, 1.0, 1.0], lm_head)
    batch = split.batch()
    loss = make_loss(speculator, weights, lm_head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss_module.CHUNK_LOGITS, "cpu", chunk)
        total, found = measure(loss, batch)
    torch.testing.assert_close(total, expected)
    figures = torch.cat([found, loss.supervise(batch).counts[:, None]], 1)
    torch.testing.assert_close(figures, torch.tensor(sums, dtype=torch.float64))
    parameters = [p for p in speculator.parameters() if p.requires_grad]
    grads = torch.autograd.grad(total, parameters)
    if expected.requires_grad:
        wanted = torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True)
        for grad, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, other)
    else:
        assert not any(grad.any() for grad in grads)


@settings(max_examples=30)
@given(split=splits(), cuts=st.lists(st.integers(0, 4), max_size=3), soft=st.booleans(), case=st.sampled_from(CASES))
def test_micro_batches_add_up(split: Split, cuts: list[int], soft: bool, case: tuple[str, dict[str, Any]]) -> None:
    speculator = make(*case, 11)
    loss = make_loss(speculator, [1.0, 2.0, 3.0], table() if soft else None)
    counts = loss.supervise(split.batch()).counts
    whole, sums = measure(loss, split.batch(), counts)
    parameters = [p for p in speculator.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(whole, parameters)
    places = [0, *sorted(min(cut, len(split.rows)) for cut in cuts), len(split.rows)]
    parts = [range(a, b) for a, b in pairwise(places) if a < b]
    measured = [measure(loss, split.batch(part), counts) for part in parts]
    speculator.zero_grad()
    for total, _ in measured:
        total.backward()
    torch.testing.assert_close(torch.stack([total for total, _ in measured]).sum(), whole)
    torch.testing.assert_close(torch.stack([found for _, found in measured]).sum(0), sums)
    for parameter, other in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, other)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("method", "changed"), CASES)
def test_a_batch_without_supervised_tokens_moves_nothing(method: str, changed: dict[str, Any], soft: bool) -> None:
    """And every parameter still gets a gradient, which data-parallel training waits for."""
    speculator, states = make(method, changed, None), torch.randn(2, D, dtype=torch.float64)
    alone = replace(pack([sequence([0, 1, 0, 0, 1])]), states={LAST: states})  # no two in a row
    none = replace(pack([]), states={LAST: states[:0]})
    for nothing in (alone, none):
        loss = make_loss(speculator, None, table() if soft else None)
        total, sums = measure(loss, nothing, torch.zeros(3, dtype=torch.long))
        speculator.zero_grad()
        total.backward()
        assert total.item() == 0
        assert not sums.any()
        for parameter in speculator.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()

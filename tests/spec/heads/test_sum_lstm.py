import torch
from torch.nn import functional as F

from spec.heads import build

from .reference import config, inputs

GATES = ("forget", "input", "cell", "output")


def names(**changes: object) -> set[str]:
    return set(build(config("sum_lstm", **changes)).state_dict())


def test_names() -> None:
    expected = {f"{gate}_emb.0.weight" for gate in GATES}
    expected |= {f"{gate}_proj.{j}.weight" for gate in GATES for j in (0, 1)}
    expected |= {f"{norm}_ln.0.{p}" for norm in ("cell", "state") for p in ("weight", "bias")}
    expected |= {f"head.{i}.weight" for i in range(3)}
    assert names() == names(tie_lstm_embs=True) == expected


def test_stack_names() -> None:
    extra = names(inner_dim=(6, 8), emb_dim=(6, 8), proj_dim=(6, 8)) - names()
    tail = ("0.weight", "1.weight", "1.bias", "3.weight")
    expected = {f"{gate}_emb.0.{t}" for gate in GATES for t in tail}
    expected |= {f"{gate}_proj.{j}.{t}" for gate in GATES for j in (0, 1) for t in tail}
    expected |= {"adapter.0.weight", "inner.0.0.weight", "inner.0.0.bias", "inner.0.2.weight"}
    assert extra == expected


def test_tied_embeddings_are_one() -> None:
    V, w = 23, 8
    separate = build(config("sum_lstm")).num_parameters()
    assert separate - build(config("sum_lstm", tie_lstm_embs=True)).num_parameters() == 3 * V * w
    stacks = {"emb_dim": (6, 8)}
    separate = build(config("sum_lstm", **stacks)).num_parameters()
    tied = build(config("sum_lstm", **stacks, tie_lstm_embs=True)).num_parameters()
    assert separate - tied == 3 * (V * 6 + 2 * 6 + 6 * 8)


def test_the_first_forget_projection_has_a_gradient_of_exactly_zero() -> None:
    for dims in ((8,), (4, 8)):
        c = config("sum_lstm", proj_dim=dims)
        speculator = build(c)
        states, tokens = inputs(c)
        logits = speculator(states, tokens)
        F.cross_entropy(logits.flatten(0, 1), tokens.T.flatten()).backward()
        grads = {name: p.grad for name, p in speculator.named_parameters()}
        idle = {name for name, grad in grads.items() if grad is not None and not grad.any()}
        assert idle == {name for name in grads if name.startswith("forget_proj.0.")}
        assert idle < speculator.undecayed()


def test_a_single_head_leaves_the_second_projection_out_of_training() -> None:
    speculator = build(config("sum_lstm", n_predict=1))
    frozen = {name for name, p in speculator.named_parameters() if not p.requires_grad}
    assert frozen == {f"{gate}_proj.1.weight" for gate in GATES}


def test_decay_spares_the_norms_the_tables_and_the_idle_projection() -> None:
    norms = {f"{norm}_ln.0.{p}" for norm in ("cell", "state") for p in ("weight", "bias")}
    tables = {f"{gate}_emb.0.weight" for gate in GATES}
    assert build(config("sum_lstm")).undecayed() == norms | tables | {"forget_proj.0.weight"}
    tied = build(config("sum_lstm", tie_lstm_embs=True)).undecayed()
    assert tied == norms | {"forget_emb.0.weight", "forget_proj.0.weight"}


def test_all_gates_read_the_same_state() -> None:
    """The gates' order of computation cannot matter: swapping input and output parameters swaps their roles only."""
    c = config("sum_lstm", n_predict=1)
    speculator = build(c)
    states, tokens = inputs(c)
    with torch.no_grad():
        speculator.output_proj[0].weight.fill_(0)  # type: ignore[union-attr]
        speculator.output_emb[0].weight.fill_(0)  # type: ignore[union-attr]
        halved = speculator(states, tokens)
        speculator.output_emb[0].weight.fill_(100)  # type: ignore[union-attr]
        full = speculator(states, tokens)
    torch.testing.assert_close(2 * halved, full)

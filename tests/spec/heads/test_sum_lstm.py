import pytest
from torch.nn import functional as F

from spec.heads import build

from .reference import config, inputs

GATES = ("forget", "input", "cell", "output")


@pytest.mark.parametrize(("dims", "table"), [((8,), 23 * 8), ((6, 8), 23 * 6 + 2 * 6 + 6 * 8)])
def test_tied_embeddings_are_one(dims: tuple[int, ...], table: int) -> None:
    separate, tied = (build(config("sum_lstm", emb_dim=dims, tie_lstm_embs=tie)) for tie in (False, True))
    assert separate.num_parameters() - tied.num_parameters() == 3 * table
    assert separate.state_dict().keys() == tied.state_dict().keys()  # as public files have it


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


def test_a_single_head_leaves_the_second_projection_out_of_training() -> None:
    speculator = build(config("sum_lstm", n_predict=1))
    frozen = {name for name, p in speculator.named_parameters() if not p.requires_grad}
    assert frozen == {f"{gate}_proj.1.weight" for gate in GATES}

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spec.heads import Speculator, build

from .reference import config, inputs


def tables(rows: int = 23, d: int = 12) -> dict[str, Tensor]:
    """Embedding and lm_head with a common offset and a few strong directions, as real ones have."""
    g = torch.Generator().manual_seed(7)
    spread = torch.linspace(3, 0.3, d)
    made = [torch.randn(rows, d, generator=g) * spread + 2 * torch.randn(d, generator=g) for _ in range(2)]
    return dict(zip(("embedding", "lm_head"), made, strict=True))


def same(a: Speculator, b: Speculator) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm"])
def test_random_weights_have_the_public_spread(method: str) -> None:
    c = config(method, hidden_size=48, vocab_size=400, inner_dim=(64,), emb_dim=(64,), proj_dim=(64,))
    speculator = build(c)
    speculator.initialise()
    for name, p in speculator.named_parameters():
        if "ln" in name:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight"))))
        else:
            assert p.std().item() == pytest.approx(1 / math.sqrt(min(p.shape)), rel=0.1)
            assert abs(p.mean().item()) < 0.01


@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm"])
def test_weights_follow_the_seed_alone(method: str) -> None:
    a, b = build(config(method)), build(config(method))
    for start in (None, tables()):
        a.initialise(start, 3)
        torch.rand(5)
        b.initialise(start, 3)
        assert same(a, b)
        b.initialise(start, 4)
        assert not same(a, b)


def test_equal_widths_copy_the_tables() -> None:
    """Up to the mean row and one factor; the embedding also up to a rotation, which keeps all its inner products."""
    speculator = build(config(inner_dim=(12,), emb_dim=(12,), proj_dim=(12,)))
    speculator.initialise(tables())
    w, (embedding, lm_head) = speculator.state_dict(), tables().values()
    rows = lm_head - lm_head.mean(0)
    torch.testing.assert_close(w["head.0.weight"], rows / rows.square().sum(1).mean().sqrt())
    rows = embedding - embedding.mean(0)
    rows = rows / rows.square().sum(1).mean().sqrt()
    torch.testing.assert_close(w["emb.0.0.weight"] @ w["emb.0.0.weight"].T, rows @ rows.T)
    assert torch.equal(w["proj.0.0.weight"], torch.eye(12))
    assert torch.equal(w["proj.1.0.weight"], torch.eye(12))


def test_narrower_heads_keep_what_varies_most() -> None:
    speculator, lm_head = build(config()), tables()["lm_head"]  # 8 of 12
    speculator.initialise(tables())
    w = speculator.state_dict()
    states = torch.randn(4, 12)
    exact = states @ (lm_head - lm_head.mean(0)).T
    through = states @ w["proj.0.0.weight"].T @ w["head.0.weight"].T
    through *= (exact * through).sum() / through.square().sum()
    assert (exact - through).square().mean() < 0.1 * exact.square().mean()


def test_wider_heads_have_no_dead_columns() -> None:
    speculator = build(config(inner_dim=(20,), emb_dim=(20,), proj_dim=(20,)))
    speculator.initialise(tables())
    for name, p in speculator.named_parameters():
        if name.startswith(("head", "emb")):
            assert p.square().sum(0).min() > 0.01
            assert p.square().sum(1).mean().item() == pytest.approx(1, rel=0.25)


@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm"])
@pytest.mark.parametrize("width", [(8,), (12,), (20,), (6, 8)])
@pytest.mark.parametrize("size", [None, 9])
def test_the_first_loss_is_sane(method: str, width: tuple[int, ...], size: int | None) -> None:
    kept = None if size is None else torch.arange(0, 18, 2)
    c = config(method, inner_dim=width, emb_dim=width, proj_dim=width, tie_lstm_embs=True, draft_vocab_size=size)
    speculator = build(c, kept)
    speculator.initialise(tables())
    states, tokens = inputs(c, positions=200)
    logits = speculator(states, tokens)
    targets = torch.randint(logits.shape[-1], logits.shape[:-1])
    assert F.cross_entropy(logits.flatten(0, 1), targets.flatten()) < math.log(logits.shape[-1]) + 0.6


def test_tied_bases_do_not_start_by_repeating_their_input() -> None:
    table = tables(200)["lm_head"]
    c = config(vocab_size=200, scale_input=True)
    speculator = build(c)
    speculator.initialise({"embedding": table, "lm_head": table})
    states, tokens = inputs(c, positions=200)
    for i, logits in enumerate(speculator(states, tokens)):
        assert (logits.argmax(-1) == tokens[:, i]).float().mean() < 0.05


def test_untied_heads_are_all_filled() -> None:
    speculator = build(config(tie_weights=False))
    speculator.initialise(tables())
    w = speculator.state_dict()
    assert torch.equal(w["head.0.weight"], w["head.2.weight"])
    assert torch.equal(w["proj.2.0.weight"], torch.eye(8))


def test_half_precision_tables_and_weights() -> None:
    speculator = build(config()).to(torch.bfloat16)
    speculator.initialise({name: table.to(torch.bfloat16) for name, table in tables().items()})
    assert all(p.isfinite().all() for p in speculator.parameters())

"""Logits that are more than lm_head times the state: told by the base, kept with its tables, taught to the heads."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bench.bases import make, prompts
from spec.base import PLAIN, Base, Logits, Teacher, bias_of, find_logits, hidden_states
from spec.store import tables
from spec.training.loss import linear_cross_entropy

KINDS = {
    "llama": PLAIN,
    "phi": Logits(bias=True),
    "cohere": Logits(scale=0.3),
    "granite": Logits(scale=1 / 3),
    "falcon_h1": Logits(scale=0.5),
    "gemma2": Logits(softcap=5.0),
}
ROWS = [np.asarray(prompt, np.int32) for prompt in prompts(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", KINDS)
def test_how_logits_are_made_is_found(family: str, dtype: torch.dtype) -> None:
    base = make(family)
    base = replace(base, model=copy.deepcopy(base.model).to(dtype))
    assert find_logits(base, ROWS) == KINDS[family]
    base.model.get_output_embeddings().register_forward_hook(lambda module, args, out: out.clone().sin_())
    assert find_logits(base, ROWS) is None


def true_logits(base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    """States [S, d] of a sequence, and its logits."""
    ids = torch.from_numpy(ROWS[0])[None].long()
    return hidden_states(base.model, ids)[0], base.model(ids).logits[0]


@pytest.mark.parametrize("family", KINDS)
def test_tables_hold_what_logits_are_made_of(family: str, tmp_path: Path) -> None:
    base = make(family)
    collection = tables.collection(tmp_path, {"weights": "w"}, "float32")
    collection.create()
    tables.save(base, collection, ROWS)
    found, kind = tables.Tables(collection), tables.logits(collection)
    assert kind == KINDS[family]
    states, logits = true_logits(base)
    torch.testing.assert_close(kind.apply_(states @ found["lm_head"].T, found.get("bias")), logits)


@pytest.mark.parametrize("family", KINDS)
def test_heads_are_taught_the_bases_own_distribution(family: str) -> None:
    base = make(family)
    states, logits = true_logits(base)
    hidden, weight = torch.randn(len(states), 8), torch.randn(base.vocab_size, 8)
    targets, scale = torch.zeros(len(states), dtype=torch.int64), torch.ones(len(states))
    teacher = Teacher(base.lm_head, KINDS[family], bias_of(base.model))
    _, losses, _ = linear_cross_entropy(hidden, weight, targets, scale, (states, teacher))
    expected = F.kl_div((hidden @ weight.T).log_softmax(-1), logits.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)

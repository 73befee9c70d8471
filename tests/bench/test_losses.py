"""What the benchmark of training compares does the same work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import train
from spec.store.reader import FeatureReader
from tests.spec.training.runs import ALONE, D, V, make_config, make_speculator
from tests.tiny import chain, store_features

EAGLE3 = {"layers": 2, "layer": {"heads": 2, "kv_heads": 1, "head_dim": 4, "intermediate_size": 16}}


@pytest.mark.parametrize(
    ("method", "loss", "forms", "shape"),
    [
        ("sum_rnn", "ce", train.FORMS[::2], {}),
        ("eagle3", "kl", train.EAGLE3_FORMS, EAGLE3),
        ("eagle3", "kl", train.EAGLE3_FORMS, EAGLE3 | {"draft_vocab_size": 12}),
    ],
)
def test_every_form_comes_to_the_same_losses(
    method: str, loss: str, forms: tuple[str, ...], shape: dict[str, Any], tmp_path: Path
) -> None:
    config, parts = make_config(optim={"loss": loss}), [[0, 1, 2], [3, 4], [5, 6, 7]]
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    found = []
    for form in forms:
        speculator = make_speculator(method, **shape)
        speculator.lend({"embedding": table})
        reader = FeatureReader(store_features(tmp_path, chain(8, V), taps=speculator.taps[::-1]), tmp_path)
        recipe = train.make(form, config, speculator, reader, parts, ALONE, {"lm_head": table})
        found.append([recipe.step(number) for number in range(3)])
    for steps in found[1:]:
        assert [positions for positions, _ in steps] == [positions for positions, _ in found[0]]
        assert [value for _, value in steps] == pytest.approx([value for _, value in found[0]], rel=1e-4)

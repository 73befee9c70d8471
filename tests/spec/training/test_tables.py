"""Only the rows that occur are trained, and nobody can tell from what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from spec.config import Config
from spec.heads import Speculator
from spec.store.reader import FeatureReader
from spec.training import loop
from spec.training.frozen import FrozenTask
from spec.training.loss import SpeculatorLoss
from spec.training.resume import Checkpoints
from spec.training.schedule import factor
from spec.training.tables import OccurringRows, twin
from tests.spec.training.runs import ALONE, D, N, make_config, make_speculator
from tests.tiny import chain, sequence, store_features

V = 64
OCCURRING = 24
SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("sum_rnn", {}),
    ("sum_rnn", {"tie_weights": False}),
    ("sum_rnn", {"emb_dim": (8, 16), "proj_dim": (16, 16), "inner_dim": (16, 32)}),
    ("sum_rnn", {"draft_vocab_size": 60}),
    ("sum_rnn", {"emb_dim": (5,), "proj_dim": (5,), "inner_dim": (7,)}),
    ("sum_lstm", {}),
    ("sum_lstm", {"tie_lstm_embs": True}),
    ("sum_lstm", {"emb_dim": (8, 16)}),
]


def speculator_of(method: str, changed: dict[str, Any]) -> Speculator:
    return make_speculator(method, **({"vocab_size": V} | changed))


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureReader, FeatureReader]:
    """The last of val's rows hold tokens that train lacks."""
    root = tmp_path_factory.mktemp("store")
    rows = [*chain(30, OCCURRING), sequence([0, 0, 1, 1, 1, 0, 1, 1], [60, 61, 1, 2, 3, 62, 4, 5])]
    others = [*chain(5, OCCURRING, seed=1), sequence([0, 1, 1, 1, 1], [1, 50, 51, 52, 53])]
    made = [store_features(root, split, vocab_size=V, hidden_size=D) for split in (rows, others)]
    return FeatureReader(made[0], root), FeatureReader(made[1], root)


def train_whole_tables(config: Config, speculator: Speculator, task: FrozenTask, reader: FeatureReader) -> None:
    """What a run comes to without any trick, on the task's batches."""
    loss = SpeculatorLoss(speculator)
    kept = speculator.undecayed()
    named = list(speculator.named_parameters())
    groups = [
        {"params": [p for name, p in named if name not in kept], "weight_decay": config.optim.weight_decay},
        {"params": [p for name, p in named if name in kept], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, fused=True)
    size = config.data.train_batch_size
    order = [task.order(epoch) for epoch in range(config.trainer.total_epochs)]
    batches = [epoch[at : at + size] for epoch in order for at in range(0, len(epoch), size)]
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * factor(config.optim, step, len(batches))
        positions = reader.positions(task.share(batch), N)
        supervision = loss.supervise(positions)
        optimizer.zero_grad()
        loss(positions.states, supervision, supervision.counts)[0].backward()
        nn.utils.clip_grad_norm_(speculator.parameters(), config.optim.clip_grad)
        optimizer.step()


@pytest.mark.parametrize(("method", "changed"), SHAPES)
def test_rows_that_occur_are_trained_as_in_the_whole_table(
    readers: tuple[FeatureReader, FeatureReader], tmp_path: Path, method: str, changed: dict[str, Any]
) -> None:
    """Bit for bit, also where heads are fed tokens that no answer holds."""
    config = make_config(optim={"weight_decay": 0.3, "clip_grad": 1e9})
    found, expected, initial = (speculator_of(method, changed) for _ in range(3))
    task = FrozenTask(config, found, *readers, ALONE)
    loop.run(config, task, ALONE, Checkpoints(tmp_path, "key"))
    task.weights()
    train_whole_tables(config, expected, task, readers[0])
    for (name, mine), other, first in zip(
        found.named_parameters(), expected.parameters(), initial.parameters(), strict=True
    ):
        assert torch.equal(mine, other), name
        if name != "forget_proj.0.weight":
            assert not torch.equal(mine, first), name


def test_clipping_sees_one_norm_whatever_the_table(
    readers: tuple[FeatureReader, FeatureReader], tmp_path: Path
) -> None:
    """The norm is summed over fewer zeros, so in another order: equal up to rounding."""
    config = make_config(optim={"clip_grad": 0.1})
    found, expected = (speculator_of("sum_rnn", {}) for _ in range(2))
    task = FrozenTask(config, found, *readers, ALONE)
    loop.run(config, task, ALONE, Checkpoints(tmp_path, "key"))
    task.weights()
    train_whole_tables(config, expected, task, readers[0])
    for (name, mine), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(("method", "changed"), SHAPES)
def test_rows_that_never_occur_stay_as_they_began(
    readers: tuple[FeatureReader, FeatureReader], tmp_path: Path, method: str, changed: dict[str, Any]
) -> None:
    config = make_config(optim={"weight_decay": 0.3, "lr": 0.1})
    speculator, initial = speculator_of(method, changed), speculator_of(method, changed)
    task = FrozenTask(config, speculator, *readers, ALONE)
    result = loop.run(config, task, ALONE, Checkpoints(tmp_path, "key"))
    assert {50, 51, 52, 53} <= set(np.flatnonzero(readers[1].token_counts()).tolist())  # val needs them
    assert result.val["speculator_loss"] > 0
    task.weights()
    tables = [m for m in speculator.modules() if isinstance(m, nn.Embedding)]
    others = [m for m in initial.modules() if isinstance(m, nn.Embedding)]
    assert tables
    for table, other in zip(tables, others, strict=True):
        assert torch.equal(table.weight[OCCURRING:], other.weight[OCCURRING:])
        assert not (table.weight[:OCCURRING] == other.weight[:OCCURRING]).all(1).any()


def test_what_is_exchanged_and_remembered_is_as_small_as_the_vocabulary_in_use(
    readers: tuple[FeatureReader, FeatureReader],
) -> None:
    task = FrozenTask(make_config(), speculator_of("sum_lstm", {}), *readers, ALONE)
    assert {p.shape for name, p in task.module.named_parameters() if "_emb." in name} == {(OCCURRING, 16)}


TOKENS = torch.tensor([0, 3, 4, 9])


@pytest.mark.parametrize(("method", "changed"), SHAPES)
def test_a_twin_shares_all_but_its_tables(method: str, changed: dict[str, Any]) -> None:
    whole = speculator_of(method, changed)
    made, tables = twin(whole, TOKENS)
    assert type(made) is type(whole)
    assert made.config == whole.config
    embeddings = {name for name, module in whole.named_modules() if isinstance(module, nn.Embedding)}
    assert {name for name, module in made.named_modules() if isinstance(module, OccurringRows)} == embeddings
    assert len(tables) == len(embeddings) == len(set(map(id, tables)))
    assert not any(isinstance(module, nn.Embedding) for module in made.modules())
    others = dict(whole.named_parameters())
    assert dict(made.named_parameters()).keys() == others.keys()
    for name, parameter in made.named_parameters():
        if name.removesuffix(".weight") in embeddings:
            assert torch.equal(parameter, others[name][TOKENS])
            assert parameter.data_ptr() != others[name].data_ptr()
        else:
            assert parameter is others[name]
    shared = dict(whole.named_buffers())
    for name, buffer in made.named_buffers():
        assert name.rpartition(".")[0] in embeddings or buffer is shared[name]
    assert whole.num_parameters() - made.num_parameters() == sum(
        others[f"{name}.weight"].numel() * (V - len(TOKENS)) // V for name in embeddings
    )


@pytest.mark.parametrize(("method", "changed"), SHAPES)
def test_a_twin_says_what_the_whole_one_says(method: str, changed: dict[str, Any]) -> None:
    whole = speculator_of(method, changed)
    made, _ = twin(whole, TOKENS)
    states = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    tokens = TOKENS[torch.tensor([[0, 1, 2], [3, 2, 1], [1, 1, 1], [0, 0, 3], [2, 3, 0]])]
    assert torch.equal(made(states, tokens), whole(states, tokens))


def test_rows_go_to_the_table_and_back() -> None:
    table = nn.Embedding(12, 4)
    before = table.weight.detach().clone()
    rows = OccurringRows(table, TOKENS)
    assert [name for name, _ in rows.named_parameters()] == ["weight"]
    with torch.no_grad():
        rows.weight += 1
    assert torch.equal(table.weight, before)
    rows.flush()
    expected = before.clone()
    expected[TOKENS] += 1
    assert torch.equal(table.weight, expected)
    with torch.no_grad():
        table.weight.mul_(2)
    rows.reload()
    assert torch.equal(rows.weight, 2 * expected[TOKENS])
    rows.flush()
    assert torch.equal(table.weight, 2 * expected)
    assert torch.equal(rows(torch.tensor([[9, 0], [3, 3]])), table(torch.tensor([[9, 0], [3, 3]])))


def test_weights_are_kept_and_restored_whole(readers: tuple[FeatureReader, FeatureReader], tmp_path: Path) -> None:
    config = make_config()
    task = FrozenTask(config, speculator_of("sum_lstm", {}), *readers, ALONE)
    began = task.weights()
    loop.run(config, task, ALONE, Checkpoints(tmp_path, "key"))
    ended = task.weights()
    for weights in (began, ended):
        task.restore(weights)
        assert all(torch.equal(weight, weights[name]) for name, weight in task.weights().items())
        assert all(torch.equal(p, weights[name]) for name, p in task.speculator.named_parameters())
    assert not torch.equal(began["cell_emb.0.weight"], ended["cell_emb.0.weight"])

"""Only the rows that occur are trained, and nobody can tell from what comes out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spec.config import Config
from spec.heads import Speculator
from spec.store.reader import FeatureReader
from spec.training import loop
from spec.training.frozen import FrozenTask, validate
from spec.training.loss import SpeculatorLoss
from spec.training.resume import Checkpoints
from spec.training.schedule import factor
from tests.spec.training.runs import ALONE, D, make_config, make_speculator, weights_of
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
        supervision = loss.supervise(reader.packed(task.share(batch)))
        optimizer.zero_grad()
        loss(supervision, supervision.counts)[0].backward()
        nn.utils.clip_grad_norm_(speculator.parameters(), config.optim.clip_grad)
        optimizer.step()


@pytest.mark.parametrize(("method", "changed"), SHAPES)
def test_rows_that_occur_are_trained_as_in_the_whole_table(
    readers: tuple[FeatureReader, FeatureReader], tmp_path: Path, method: str, changed: dict[str, Any]
) -> None:
    """Bit for bit, also where heads are fed tokens that no answer holds, and val needs rows that train lacks."""
    config = make_config(optim={"weight_decay": 0.3, "clip_grad": 1e9}, trainer={"test_freq": 1000})
    found, expected, initial = (speculator_of(method, changed) for _ in range(3))
    task = FrozenTask(config, found, *readers, ALONE)
    began = weights_of(task)
    result = loop.run(task, Checkpoints(tmp_path, "key"))
    train_whole_tables(config, expected, task, readers[0])
    assert result.val == validate(SpeculatorLoss(expected), readers[1], ALONE, mixed=False)
    trained, others = found.named_parameters(), expected.parameters()
    for (name, mine), other, first in zip(trained, others, initial.parameters(), strict=True):
        assert torch.equal(mine, other), name
        if name != "forget_proj.0.weight":
            assert not torch.equal(mine, first), name
    task.restore(began)
    assert all(torch.equal(mine, first) for mine, first in zip(found.parameters(), initial.parameters(), strict=True))


def test_what_is_exchanged_is_as_small_as_the_vocabulary(readers: tuple[FeatureReader, FeatureReader]) -> None:
    task = FrozenTask(make_config(), speculator_of("sum_lstm", {}), *readers, ALONE)
    assert {p.shape for name, p in task.module.named_parameters() if "_emb." in name} == {(OCCURRING, 16)}

"""Base and heads together: both learn, the base by both losses, however the work is shared or interrupted."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spec.acceptance import draft_answers, tokens_per_step, walks
from spec.corpus import TokenSequence
from spec.store.features import kept_positions
from spec.training import loop
from spec.training.joint import JointTask, LiveReader
from spec.training.loop import Progress
from spec.training.resume import Checkpoints
from tests.spec.training import runs
from tests.spec.training.runs import ALONE, N, joint_config, joint_rows, joint_task, outcome, weights_of
from tests.tiny import make_base, with_instructions

TOTAL = 30


@pytest.fixture(scope="module")
def exact(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base without dropout."""
    folder = tmp_path_factory.mktemp("exact") / "gpt2"
    shutil.copytree(base_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("qwen") / "qwen2", "qwen2")


def run(task: JointTask, folder: Path, told: list[Progress] | None = None) -> loop.Result:
    listen = (lambda progress: None) if told is None else told.append
    return loop.run(task, Checkpoints(folder, "key"), listen)


@pytest.mark.parametrize("family", ["exact", "qwen"])
def test_both_learn(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    config = joint_config(trainer={"total_epochs": 10, "test_freq": 20, "save_freq": 1000}, optim={"lr": 0.02})
    task = joint_task(config, request.getfixturevalue(family), ALONE)
    before = weights_of(task)
    told: list[Progress] = []
    result = run(task, tmp_path, told)
    for name in ("speculator_loss", "base_loss"):
        losses = runs.losses_of(told, name)
        assert losses[-1] < 0.6 * losses[0], name
    assert result.val["base_loss"] < 0.5 * np.log(task.base.vocab_size)
    after = weights_of(task)
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert not torch.equal(weight, before[name]), name
    # What is told of the base is of every position that heads draft from.
    last = told[-2].metrics
    assert set(last) >= {"base_accuracy", "accuracy.1", "accuracy.2", "accuracy.3"}
    assert last["positions_seen"] == 10 * sum(int(row.mask[1:].sum()) for row in joint_rows(22, 0))


def plain_losses(task: JointTask, rows: list[TokenSequence]) -> tuple[Tensor, Tensor]:
    """The base's cross-entropy and the heads', from all logits, one sequence at a time and without padding."""
    base, speculator = task.base.model, task.speculator
    own: list[Tensor] = []
    drafts: list[list[Tensor]] = [[] for _ in range(N)]
    for row in rows:
        ids = torch.from_numpy(row.ids).long()
        found = base(input_ids=ids[None], output_hidden_states=True)
        logits, hidden = found.logits[0], found.hidden_states[-1][0]
        for t in np.flatnonzero(row.mask[1:]).tolist():
            own.append(F.cross_entropy(logits[t], ids[t + 1]))
        fed = torch.stack([F.pad(ids, (0, N))[1 + i : 1 + i + len(ids)] for i in range(N)], 1)
        guesses = speculator(hidden, fed)
        for i in range(N):
            for t in range(len(ids) - 2 - i):
                if row.mask[t + 1 : t + 3 + i].all():
                    drafts[i].append(F.cross_entropy(guesses[i, t], ids[t + 2 + i]))
    return torch.stack(own).mean(), torch.stack([torch.stack(part).mean() for part in drafts]).mean()


@pytest.mark.parametrize("coeff", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("family", ["exact", "qwen"])
def test_gradients_of_both_losses_reach_the_base(family: str, coeff: float, request: pytest.FixtureRequest) -> None:
    """The gradient is that of base_loss + coeff * speculator_loss, by plain autograd."""
    task = joint_task(joint_config(model={"speculator_loss_coeff": coeff}), request.getfixturevalue(family), ALONE)
    rows = joint_rows(22, 0)[:5]
    assert any((np.diff(row.mask.astype(int)) < 0).any() for row in rows)  # of two turns
    named = dict(task.base.model.named_parameters()) | dict(task.speculator.named_parameters())
    parameters = list(named.values())
    base, heads = plain_losses(task, rows)
    of_base, of_heads = (
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in (base, heads)
    )
    (batch,) = task.batches(iter([range(5)]))
    total, sums = task.module(batch, batch.counts)
    torch.testing.assert_close(total, base + coeff * heads)
    torch.testing.assert_close(sums[-1, 0] / batch.counts[-1], base)
    torch.testing.assert_close((sums[:-1, 0] / batch.counts[:-1]).mean(), heads)
    assert batch.counts[-1] == batch.positions == sum(len(kept_positions(row.mask)) for row in rows)
    total.backward()
    for (name, parameter), one, other in zip(named.items(), of_base, of_heads, strict=True):
        torch.testing.assert_close(parameter.grad, one + coeff * other, rtol=1e-4, atol=1e-6, msg=name)
    inside = dict(zip(named, of_heads, strict=True))
    assert all(inside[name].any() for name, _ in task.base.model.named_parameters())


@pytest.mark.parametrize("family", ["exact", "qwen"])
def test_the_bases_parameters_have_their_own_rate(family: str, request: pytest.FixtureRequest) -> None:
    task = joint_task(joint_config(optim={"weight_decay": 0.5}), request.getfixturevalue(family), ALONE)
    rows = [(p, group["lr"], group["weight_decay"]) for group in task.parameters() for p in group["params"]]
    base, speculator = (dict(module.named_parameters()) for module in (task.base.model, task.speculator))
    assert len(rows) == len({id(p) for p, *_ in rows}) == len(base) + len(speculator)
    rates = {id(p): (lr, decay) for p, lr, decay in rows}
    for name, parameter in base.items():
        spared = parameter.ndim < 2 or any(word in name for word in ("wte", "wpe", "embed_tokens"))
        assert rates[id(parameter)] == (0.002, 0.0 if spared else 0.5), name
    for name, parameter in speculator.items():
        assert rates[id(parameter)] == (0.01, 0.0 if "ln." in name or "emb." in name else 0.5), name


@pytest.mark.parametrize("family", ["exact", "base_folder", "qwen"])
def test_figures_of_val_are_those_of_the_live_states(family: str, request: pytest.FixtureRequest) -> None:
    """Without dropout, which only training has."""
    task = joint_task(joint_config(), request.getfixturevalue(family), ALONE)
    metrics = task.validate()
    assert task.base.model.training
    rows = joint_rows(5, 1)
    task.base.model.eval()
    with torch.no_grad():
        base, heads = plain_losses(task, rows)
    assert metrics["base_loss"] == pytest.approx(base.item(), rel=1e-5)
    assert metrics["speculator_loss"] == pytest.approx(heads.item(), rel=1e-5)
    assert task.score(metrics) == pytest.approx(-(base + 0.5 * heads).item(), rel=1e-5)
    reader = LiveReader(task.base, rows, mixed=False)
    found = walks(reader, draft_answers(task.speculator, reader))
    assert metrics["tokens_per_step"] == tokens_per_step(found)
    assert [walk.domain for walk in found] == [row.domain for row in rows]
    assert not any(walk.greedy for walk in found)


@pytest.mark.parametrize("instructions", [["avx512_bf16"], []])
def test_mixed_precision_keeps_weights(
    exact: Path, tmp_path: Path, instructions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_instructions(monkeypatch, *instructions)
    task = joint_task(joint_config(model={"dtype": "bfloat16"}), exact, ALONE)
    result = run(task, tmp_path / "mixed")
    assert {weight.dtype for weight in weights_of(task).values()} == {torch.float32}
    other = run(joint_task(joint_config(), exact, ALONE), tmp_path / "exact")
    assert result.val["base_loss"] == pytest.approx(other.val["base_loss"], rel=0.05)
    assert result.val["speculator_loss"] == pytest.approx(other.val["speculator_loss"], rel=0.05)
    assert (result.val == other.val) == (not instructions)


@pytest.mark.parametrize("world", [2, 4])
def test_several_workers_come_out_where_one_does(qwen: Path, tmp_path: Path, world: int) -> None:
    """The last batch of an epoch has two sequences: of four workers two have none."""
    runs.assert_workers_agree(partial(runs.make_exact_joint, qwen), tmp_path, world, atol=1e-4, close=1e-5)


@pytest.mark.parametrize("stops", [[("train", 10)], [("val", 4), ("val", 12), ("train", 20), ("val", 30)]])
def test_interrupted_runs_come_out_the_same(base_folder: Path, tmp_path: Path, stops: list[tuple[str, int]]) -> None:
    """Dropout included."""
    torch.manual_seed(0)
    expected = outcome(runs.make_joint(base_folder, ALONE), tmp_path / "whole")
    torch.manual_seed(0)
    for split, step in stops:
        task, checkpoints = runs.make_joint(base_folder, ALONE), Checkpoints(tmp_path / "parts", "key")
        with pytest.raises(runs.InterruptedRunError):
            loop.run(task, checkpoints, runs.interrupt(split, step))
    runs.assert_same_outcome(outcome(runs.make_joint(base_folder, ALONE), tmp_path / "parts"), expected)
    assert [step for split, step, *_ in expected["history"] if split == "val"] == [4, 8, 12, 16, 20, 24, 28, 30]

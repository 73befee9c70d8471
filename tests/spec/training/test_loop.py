"""Training: it learns, and neither workers nor micro-batches change what comes out."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from spec.acceptance import accuracy, draft_answers, tokens_per_step, walks
from spec.errors import SpecError
from spec.heads import LAST, Supervision, supervise
from spec.store.manifest import Manifest
from spec.store.reader import FeatureReader
from spec.training import frozen, loop
from spec.training.frozen import FrozenTask, head_metrics, with_true_inputs
from spec.training.loop import Progress
from spec.training.loss import SpeculatorLoss
from spec.training.resume import Checkpoints
from spec.training.schedule import factor
from spec.workers import Worker
from tests.spec.training import runs
from tests.spec.training.runs import ALONE, TOTAL, D, N, V, frozen_task, make_config, make_speculator, run
from tests.tiny import with_instructions

BATCHES = {"train_batch_size": 7, "micro_batch_size_per_gpu": 2}
TAUGHT = {"loss": "kl", "head_weights": [1.0, 0.5, 0.25]}
CASES = {"ce": make_config(data=BATCHES), "kl": make_config(data=BATCHES, optim=TAUGHT)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_store(tmp_path_factory.mktemp("store"))


def test_it_learns_all_there_is(store: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    config = make_config(optim={"lr": 0.05}, trainer={"total_epochs": 12, "test_freq": 1000, "save_freq": 1000})
    wide = make_speculator(inner_dim=(32,), emb_dim=(32,), proj_dim=(32,))
    result, _ = run(store, tmp_path, config, wide, told.append)
    losses = runs.losses_of(told)
    assert losses[0] > 0.5 * np.log(V)
    assert losses[-1] < 0.1
    assert result.val["accuracy.1"] > 0.95
    assert result.val["tokens_per_step"] > 3.2  # of about 3.7, what the answers' lengths allow


def test_what_listeners_are_told(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 3)
    told: list[Progress] = []
    seen: list[tuple[int, int]] = []
    task = frozen_task(config := make_config(), store, ALONE)
    result = loop.run(task, Checkpoints(tmp_path, "key"), told.append, advance=lambda *at: seen.append(at))
    assert seen == [(step, TOTAL) for step in range(TOTAL + 1)]  # a bar moves long before a step is logged
    assert result.steps == TOTAL
    assert {progress.total for progress in told} == {TOTAL}
    assert runs.steps_of(told, "train") == [3, 6, 9, 12, 15, 16]
    assert runs.steps_of(told, "val") == [5, 10, 15, 16]
    for progress in told:
        if progress.split == "train":
            assert progress.metrics["lr"] == 0.01 * factor(config.optim, progress.step - 1, TOTAL)
            assert progress.metrics["epoch"] == progress.step / 8
            assert 0 <= progress.metrics["data_wait"] <= 1
    manifest = Manifest.load(store / "train.json")
    assert told[-2].metrics["positions_seen"] == 2 * manifest.positions
    saved = sorted(int(path.name.rpartition("_")[2]) for path in tmp_path.iterdir())
    assert saved == [3, 6, 9, 12, 15, 16]


def everything(reader: FeatureReader) -> tuple[Supervision, torch.Tensor, torch.Tensor]:
    """A split's supervised drafts, and for each position its state, and the N + 1 tokens that follow it."""
    packed = reader.packed(range(len(reader)))
    tokens = F.pad(packed.ids, (0, N))[packed.starts[:, None] + torch.arange(1, N + 2)]
    return supervise(packed, N), packed.states[LAST], tokens


@pytest.mark.parametrize("drafted", [None, 15])
def test_figures_of_a_split_are_those_of_all_its_logits(store: Path, drafted: int | None) -> None:
    speculator = make_speculator(draft_vocab_size=drafted)
    reader = FeatureReader(Manifest.load(store / "train.json"), store)  # more sequences than one batch holds
    sums = with_true_inputs(SpeculatorLoss(speculator), reader, range(len(reader)))
    batch, states, tokens = everything(reader)
    with torch.no_grad():
        logits = speculator(states, tokens[:, :N])
    index = torch.arange(V) if speculator.draft_index is None else speculator.draft_index
    for i, rows in enumerate(torch.split(batch.rows, batch.sizes)):
        drafted = rows[index[tokens[rows, i + 1]] >= 0]
        targets = index[tokens[drafted, i + 1]]
        loss = F.cross_entropy(logits[i][drafted], targets, reduction="sum")
        hits = (logits[i][drafted].argmax(1) == targets).sum()
        assert sums[i].tolist() == [pytest.approx(loss.item(), rel=1e-5), hits.item(), len(rows)]
    assert accuracy(speculator, reader) == pytest.approx((sums[:, 1] / sums[:, 2]).tolist())
    metrics = frozen.validate(SpeculatorLoss(speculator), reader, ALONE, mixed=False)
    expected = tokens_per_step(walks(reader, draft_answers(speculator, reader)))
    assert metrics["tokens_per_step"] == pytest.approx(expected)
    assert metrics["accuracy.1"] == pytest.approx(float(sums[0, 1] / sums[0, 2]))
    assert 1 + sum(metrics[f"acceptance.{i}"] for i in (1, 2, 3)) == pytest.approx(expected)


@pytest.mark.parametrize(("method", "clip"), [("sum_rnn", 0.42), ("sum_lstm", 0.32)])
def test_steps_are_adamw_on_the_mean_over_the_batch(store: Path, tmp_path: Path, method: str, clip: float) -> None:
    """Against torch, with all logits: batch (here larger than the split), loss, clipping, rate and weight decay."""
    steps, data, optim = 3, {"train_batch_size": 64}, {"clip_grad": clip, "weight_decay": 0.3}
    config = make_config(trainer={"total_epochs": steps}, data=data, optim=optim)
    expected = make_speculator(method)
    reader = FeatureReader(Manifest.load(store / "train.json"), store)
    batch, states, tokens = everything(reader)
    spared = ("ln.", "emb.", "forget_proj.0.weight")  # norms, tables and what has no gradient
    groups = [
        {"params": [p], "weight_decay": 0.0 if any(part in name for part in spared) else 0.3}
        for name, p in expected.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    norms = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor(config.optim, step, steps)
        found = zip(torch.split(batch.rows, batch.sizes), expected(states, tokens[:, :N]), strict=True)
        means = [F.cross_entropy(logits[rows], tokens[rows, i]) for i, (rows, logits) in enumerate(found, 1)]
        optimizer.zero_grad()
        torch.stack(means).mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(expected.parameters(), clip)))
        optimizer.step()
    assert min(norms) < clip < max(norms)  # Adam would not notice a factor that all steps share
    _, trained = run(store, tmp_path, config, make_speculator(method))
    for (name, mine), other in zip(trained.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=name)


def scripted(figures: list[float], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Let val say these tokens per step, one after the other; the weights at each."""
    seen: list[dict[str, torch.Tensor]] = []

    def validate(loss: SpeculatorLoss, *_: object) -> dict[str, float]:
        seen.append({name: p.detach().clone() for name, p in loss.speculator.named_parameters()})
        return {"tokens_per_step": figures[len(seen) - 1]}

    monkeypatch.setattr(frozen, "validate", validate)
    return seen


def test_the_best_heads_on_val_are_what_comes_out(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scripted([1.5, 1.9, 1.9, 1.2], monkeypatch)
    result, speculator = run(store, tmp_path)
    assert (result.step, result.val, result.steps) == (10, {"tokens_per_step": 1.9}, TOTAL)
    assert not torch.equal(seen[1]["head.0.weight"], seen[3]["head.0.weight"])
    for name, parameter in speculator.named_parameters():
        assert torch.equal(parameter, seen[3][name])
        assert torch.equal(result.weights[name], seen[1][name])
    frozen_task(make_config(), store, ALONE, speculator).restore(result.weights)
    for name, parameter in speculator.named_parameters():
        assert torch.equal(parameter, seen[1][name])


@pytest.mark.parametrize(
    ("figures", "last"),
    [
        ([2.0, 1.0, 1.0, 3.0], 6),
        ([2.0, 1.0, 3.0, 1.0, 3.0, 4.0], 10),  # an equal figure is no better one
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], TOTAL),
    ],
)
def test_a_run_stops_early_and_is_not_trained_further(
    store: Path, tmp_path: Path, figures: list[float], last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(trainer={"early_stop": 2, "test_freq": 2})
    scripted([*figures, 9.0], monkeypatch)
    expected, before = run(store, tmp_path, config)
    assert expected.steps == last
    assert (tmp_path / f"global_step_{last}").is_dir()
    found, after = run(store, tmp_path, config)
    assert (found.step, found.val, found.steps) == (expected.step, expected.val, expected.steps)
    assert all(torch.equal(one, other) for one, other in zip(after.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("instructions", [["avx512_bf16"], []])
def test_mixed_precision_keeps_weights(
    store: Path, tmp_path: Path, instructions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the teacher in what is computed in."""
    with_instructions(monkeypatch, *instructions)
    task = frozen_task(make_config(model={"dtype": "bfloat16"}, optim={"loss": "kl"}), store, ALONE)
    assert task.module.teacher.lm_head.dtype == (torch.bfloat16 if instructions else torch.float32)
    result = loop.run(task, Checkpoints(tmp_path / "mixed", "key"))
    assert {parameter.dtype for parameter in task.speculator.parameters()} == {torch.float32}
    exact, _ = run(store, tmp_path / "exact", make_config(optim={"loss": "kl"}))
    assert result.val["speculator_loss"] == pytest.approx(exact.val["speculator_loss"], rel=0.05)
    assert (result.val == exact.val) == (not instructions)  # a CPU without bf16 computes in float32


@pytest.mark.parametrize("drafted", [None, 15])
def test_heads_learn_the_bases_own_distribution(tmp_path: Path, drafted: int | None) -> None:
    made = np.random.default_rng(0).standard_normal((V, D)).astype(np.float32)
    store = runs.make_store(tmp_path / "store", lambda row: made[row.ids])  # what comes follows from the token at hand
    told: list[Progress] = []
    config = make_config(optim={"lr": 0.05, "loss": "kl"}, trainer={"total_epochs": 8, "test_freq": 20})
    speculator = make_speculator(draft_vocab_size=drafted)
    result, _ = run(store, tmp_path / "run", config, speculator, told.append)
    losses = runs.losses_of(told)
    assert losses[-1] < 0.1 * losses[0]
    reader = runs.readers_of(store)[1]
    frozen_task(config, store, ALONE, speculator).restore(result.weights)
    teacher = runs.teacher(config).over(speculator.token_map, torch.device("cpu"), torch.float32)
    loss = SpeculatorLoss(speculator, None, teacher)
    sums = with_true_inputs(loss, reader, range(len(reader)))
    assert result.val == pytest.approx(result.val | head_metrics(sums), rel=1e-5)


@pytest.mark.parametrize("trainer", [{}, {"early_stop": 1, "test_freq": 1}, {"save_freq": 1}])
def test_a_diverged_run_stops_and_says_what_to_change(store: Path, tmp_path: Path, trainer: dict[str, Any]) -> None:
    """Before its heads are measured, kept or saved."""
    with pytest.raises(SpecError, match=r"the gradient at step \d+ is nan: training has diverged\. Lower optim\.lr"):
        run(store, tmp_path, make_config(optim={"lr": 1e30}, trainer=trainer))
    for folder in tmp_path.iterdir():
        saved = torch.load(folder / "pytorch_model.bin", weights_only=True)
        assert all(weight.isfinite().all() for weight in saved.values())


def make_case(store: Path, case: str, worker: Worker) -> FrozenTask:
    return frozen_task(CASES[case], store, worker, make_speculator(draft_vocab_size=15))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_several_workers_come_out_where_one_does(store: Path, tmp_path: Path, world: int, case: str) -> None:
    """The last batch of an epoch has fewer sequences than workers."""
    assert len(runs.readers_of(store)[0]) % 5 == 0
    runs.assert_workers_agree(partial(make_case, store, case), tmp_path, world, atol=2e-6, close=1e-6)


def test_what_a_device_has_yet_to_do_counts(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = loop._Run._check

    def wait(self: Any, norm: torch.Tensor) -> None:  # as for a GPU that is still at work when it is asked
        time.sleep(0.2)
        check(self, norm)

    monkeypatch.setattr(loop._Run, "_check", wait)
    told: list[Progress] = []
    run(store, tmp_path, listen=told.append)
    for progress in told:
        if progress.split == "train":
            assert progress.metrics["positions_per_second"] < 30 * 24 * 2 / 0.2

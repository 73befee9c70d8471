"""Training: it learns, and neither workers, micro-batches nor interruptions change what comes out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from spec import config as config_module
from spec import workers
from spec.acceptance import draft_answers, head_drafts, tokens_per_step, walks
from spec.config import Config
from spec.heads import Speculator, SpeculatorConfig, build, init_random
from spec.store.manifest import Manifest
from spec.store.reader import FeatureReader
from spec.training import loop
from spec.training.loop import Progress, Result, train
from spec.training.resume import Checkpoints
from spec.training.schedule import factor
from spec.workers import Worker, joined
from tests.tiny import chain, store_features

V, D, N = 24, 8, 3
ALONE = Worker(0, 1, torch.device("cpu"))
ROOT = Path(__file__).resolve().parents[3]
VALUES: dict[str, Any] = {
    "data": {"train_batch_size": 4, "micro_batch_size_per_gpu": 4},
    "model": {"dtype": "float32"},
    "optim": {"lr": 0.01},
    "trainer": {"total_epochs": 2, "test_freq": 5, "save_freq": 3},
}


def make_config(**changed: dict[str, Any]) -> Config:
    return config_module.from_mapping({key: value | changed.get(key, {}) for key, value in VALUES.items()})


def make_speculator(method: Any = "sum_rnn", **changed: Any) -> Speculator:
    shape: dict[str, Any] = {"inner_dim": (16,), "emb_dim": (16,), "proj_dim": (16,), "n_predict": N}
    names = {"base_model_name_or_path": "", "base_digest": ""}
    config = SpeculatorConfig(method=method, hidden_size=D, vocab_size=V, **names, **(shape | changed))
    speculator = build(config, None if config.draft_vocab_size is None else torch.arange(config.draft_vocab_size))
    init_random(speculator)
    return speculator


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 sequences to train on and 7 for val."""
    root = tmp_path_factory.mktemp("store")
    for split, rows in {"train": chain(30, V), "val": chain(7, V, seed=1)}.items():
        store_features(root, rows, vocab_size=V, hidden_size=D).save(root / f"{split}.json")
    return root


def run(
    store: Path,
    checkpoints: Path,
    config: Config | None = None,
    speculator: Speculator | None = None,
    listen: Callable[[Progress], None] = lambda progress: None,
    key: str = "key",
) -> tuple[Result, Speculator]:
    readers = [FeatureReader(Manifest.load(store / f"{split}.json"), store) for split in ("train", "val")]
    speculator = speculator or make_speculator()
    config = config or make_config()
    return train(config, speculator, *readers, ALONE, Checkpoints(checkpoints, key), listen), speculator


def steps_of(told: list[Progress], split: str) -> list[int]:
    return [progress.step for progress in told if progress.split == split]


TOTAL = 16  # two epochs of 30 sequences, 4 a step


def test_it_learns_all_there_is(store: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    config = make_config(
        optim={"lr": 0.05}, trainer={"total_epochs": 12, "test_freq": 1000, "save_freq": 1000}, data={}, model={}
    )
    result, _ = run(
        store, tmp_path, config, make_speculator(inner_dim=(32,), emb_dim=(32,), proj_dim=(32,)), told.append
    )
    losses = [progress.metrics["speculator_loss"] for progress in told if progress.split == "train"]
    assert losses[0] > 0.5 * np.log(V)
    assert losses[-1] < 0.1
    assert result.val["accuracy.1"] > 0.95
    assert result.val["tokens_per_step"] > 3.2  # of about 3.7, what the answers' lengths allow


def test_what_listeners_are_told(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 3)
    told: list[Progress] = []
    config = make_config()
    result, _ = run(store, tmp_path, config, listen=told.append)
    assert result.steps == TOTAL
    assert {progress.total for progress in told} == {TOTAL}
    assert steps_of(told, "train") == [3, 6, 9, 12, 15, 16]
    assert steps_of(told, "val") == [5, 10, 15, 16]
    for progress in told:
        if progress.split == "train":
            assert progress.metrics["lr"] == 0.01 * factor(config.optim, progress.step - 1, TOTAL)
            assert progress.metrics["epoch"] == progress.step / 8
            assert 0 <= progress.metrics["data_wait"] <= 1
    manifest = Manifest.load(store / "train.json")
    assert told[-2].metrics["positions_seen"] == 2 * manifest.positions
    saved = sorted(int(path.name.rpartition("_")[2]) for path in tmp_path.iterdir())
    assert saved == [3, 6, 9, 12, 15, 16]


def test_metrics_are_means_over_positions() -> None:
    sums = np.array([[6.0, 1.0, 4.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    assert loop.head_metrics(sums) == {
        "speculator_loss": pytest.approx((1.5 + 1 + 0) / 3),
        "loss.1": 1.5,
        "loss.2": 1.0,
        "loss.3": 0.0,
        "accuracy.1": 0.25,
        "accuracy.2": 1.0,
        "accuracy.3": 0.0,
    }


@pytest.mark.parametrize("drafted", [None, 15])
def test_figures_of_a_split_are_those_of_all_its_logits(store: Path, drafted: int | None) -> None:
    speculator = make_speculator(draft_vocab_size=drafted)
    reader = FeatureReader(Manifest.load(store / "train.json"), store)  # more sequences than one batch holds
    sums = loop.with_true_inputs(speculator, reader, range(len(reader)))
    batch = reader.positions(range(len(reader)), N)
    with torch.no_grad():
        logits = speculator(batch.states, batch.tokens[:, :N])
    for i in range(N):
        targets = speculator.targets(batch.tokens[:, i + 1])
        rows = batch.valid[:, i] & (targets >= 0)
        loss = F.cross_entropy(logits[i][rows], targets[rows], reduction="sum")
        hits = (logits[i][rows].argmax(1) == targets[rows]).sum()
        assert sums[i].tolist() == [pytest.approx(loss.item(), rel=1e-5), hits.item(), batch.valid[:, i].sum().item()]
    metrics = loop.validate(speculator, reader, ALONE, mixed=False)
    expected = tokens_per_step(walks(reader, draft_answers(speculator, reader), head_drafts))
    assert metrics["tokens_per_step"] == pytest.approx(expected)
    assert metrics["accuracy.1"] == pytest.approx(float(sums[0, 1] / sums[0, 2]))
    assert 1 + sum(metrics[f"acceptance.{i}"] for i in (1, 2, 3)) == pytest.approx(expected)


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_change_nothing_but_rounding(
    store: Path, tmp_path: Path, micro: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    curves = []
    for size in (4, micro):
        told: list[Progress] = []
        config = make_config(data={"micro_batch_size_per_gpu": size}, model={}, optim={}, trainer={})
        run(store, tmp_path / str(size), config, listen=told.append)
        curves.append([progress.metrics["speculator_loss"] for progress in told if progress.split == "train"])
    assert len(curves[0]) == TOTAL
    assert len(set(curves[0])) == TOTAL
    assert curves[1] == pytest.approx(curves[0], abs=1e-6)


def test_steps_are_adamw_on_the_mean_over_the_whole_batch(store: Path, tmp_path: Path) -> None:
    """Against torch, with all logits: batch, loss, clipping, rate and weight decay."""
    steps, clip = 3, 0.42
    config = make_config(
        trainer={"total_epochs": steps},
        data={"train_batch_size": 30},
        optim={"clip_grad": clip, "weight_decay": 0.3},
        model={},
    )
    expected = make_speculator()
    reader = FeatureReader(Manifest.load(store / "train.json"), store)
    batch = reader.positions(range(len(reader)), N)
    kept = [p for name, p in expected.named_parameters() if name.startswith("ln.")]
    others = [p for name, p in expected.named_parameters() if not name.startswith("ln.")]
    groups = [{"params": others, "weight_decay": 0.3}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    norms = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor(config.optim, step, steps)
        means = [
            F.cross_entropy(logits[batch.valid[:, i]], batch.tokens[batch.valid[:, i], i + 1])
            for i, logits in enumerate(expected(batch.states, batch.tokens[:, :N]))
        ]
        optimizer.zero_grad()
        torch.stack(means).mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(expected.parameters(), clip)))
        optimizer.step()
    assert min(norms) < clip < max(norms)  # Adam would not notice a factor that all steps share
    _, found = run(store, tmp_path, config)
    for (name, mine), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=name)


class InterruptedRunError(Exception):
    """What ends a run in the middle."""


def interrupt(split: str, step: int) -> Callable[[Progress], None]:
    def listen(progress: Progress) -> None:
        if (progress.split, progress.step) == (split, step):
            raise InterruptedRunError

    return listen


def assert_same(found: tuple[Result, Speculator], expected: tuple[Result, Speculator]) -> None:
    """Bit for bit: the last weights, the best ones, and what is said of them."""
    for mine, other in zip(found[1].parameters(), expected[1].parameters(), strict=True):
        assert torch.equal(mine, other)
    assert found[0].step == expected[0].step
    assert found[0].val == expected[0].val
    assert found[0].steps == expected[0].steps
    assert found[0].weights.keys() == expected[0].weights.keys()
    assert all(torch.equal(found[0].weights[name], weight) for name, weight in expected[0].weights.items())


@pytest.mark.parametrize(
    ("method", "stops"),
    [
        ("sum_rnn", [("train", 1)]),  # before the first checkpoint
        ("sum_rnn", [("val", 10)]),
        ("sum_rnn", [("train", 8), ("train", 9), ("val", 16)]),  # at the end of an epoch, behind it, at the very end
        ("sum_lstm", [("train", 14)]),
    ],
)
def test_an_interrupted_run_comes_out_as_an_uninterrupted_one(
    store: Path, tmp_path: Path, method: str, stops: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    told: list[Progress] = []
    expected = run(store, tmp_path / "whole", speculator=make_speculator(method), listen=told.append)
    for split, step in stops:
        with pytest.raises(InterruptedRunError):
            run(store, tmp_path / "parts", speculator=make_speculator(method), listen=interrupt(split, step))
    again: list[Progress] = []
    found = run(store, tmp_path / "parts", speculator=make_speculator(method), listen=again.append)
    assert_same(found, expected)
    # The curves are those of a run without interruption, too.
    for split in ("train", "val"):
        assert steps_of(again, split) == steps_of(told, split)
    losses = [[progress.metrics["speculator_loss"] for progress in tale] for tale in (again, told)]
    assert losses[0] == losses[1]


def test_a_run_that_was_killed_while_saving_goes_on(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(store, tmp_path / "whole")
    save = torch.save
    calls: list[object] = []

    def fail(value: Any, path: Any) -> None:
        calls.append(path)
        if len(calls) == 4:  # the second checkpoint's optimizer
            raise InterruptedRunError
        save(value, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(InterruptedRunError):
            run(store, tmp_path / "parts")
    assert_same(run(store, tmp_path / "parts"), expected)


def test_another_runs_checkpoints_are_left_alone(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        run(store, tmp_path, listen=interrupt("val", 10), key="other")
    told: list[Progress] = []
    run(store, tmp_path, listen=told.append)
    assert steps_of(told, "val") == [5, 10, 15, 16]


def test_a_complete_run_is_not_trained_further(store: Path, tmp_path: Path) -> None:
    expected = run(store, tmp_path)
    assert_same(run(store, tmp_path), expected)


def test_positions_seen_are_counted_through_an_interruption(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        run(store, tmp_path, listen=interrupt("val", 10))
    told: list[Progress] = []
    run(store, tmp_path, listen=told.append)
    last = [progress for progress in told if progress.split == "train"][-1]
    assert last.metrics["positions_seen"] == 2 * Manifest.load(store / "train.json").positions


def scripted(figures: list[float], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Let val say these tokens per step, one after the other; the weights at each."""
    seen: list[dict[str, torch.Tensor]] = []

    def validate(speculator: Speculator, *_: object) -> dict[str, float]:
        seen.append({name: p.detach().clone() for name, p in speculator.named_parameters()})
        return {"tokens_per_step": figures[len(seen) - 1]}

    monkeypatch.setattr(loop, "validate", validate)
    return seen


def test_the_best_heads_on_val_are_what_comes_out(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scripted([1.5, 1.9, 1.9, 1.2], monkeypatch)
    result, speculator = run(store, tmp_path)
    assert (result.step, result.val, result.steps) == (10, {"tokens_per_step": 1.9}, TOTAL)
    assert not torch.equal(seen[1]["head.0.weight"], seen[3]["head.0.weight"])
    result.restore(speculator)
    for name, parameter in speculator.named_parameters():
        assert torch.equal(parameter, seen[1][name])


PATIENCE = {"early_stop": 2, "test_freq": 2}


@pytest.mark.parametrize(
    ("figures", "last"),
    [
        ([2.0, 1.0, 1.0, 3.0], 6),
        ([2.0, 1.0, 3.0, 1.0, 3.0, 4.0], 10),  # an equal figure is no better one
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], TOTAL),
    ],
)
def test_early_stop(
    store: Path, tmp_path: Path, figures: list[float], last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(figures, monkeypatch)
    result, _ = run(store, tmp_path, make_config(trainer=PATIENCE, data={}, model={}, optim={}))
    assert result.steps == last
    assert (tmp_path / f"global_step_{last}").is_dir()


def test_a_run_that_stopped_early_is_not_trained_further(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(trainer=PATIENCE, data={}, model={}, optim={})
    scripted([2.0, 1.0, 1.0, 9.0, 9.0], monkeypatch)
    expected = run(store, tmp_path, config)
    assert_same(run(store, tmp_path, config), expected)


@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm", "medusa"])
def test_weight_decay_spares_norms_and_what_has_no_gradient(method: str) -> None:
    speculator = build(make_speculator().config) if method == "medusa" else make_speculator(method)
    optimizer = loop.make_optimizer(speculator, make_config(optim={"weight_decay": 0.5}, data={}, model={}, trainer={}))
    names = {id(parameter): name for name, parameter in speculator.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(names) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, value in decay.items():
        spared = "ln." in name or name == "forget_proj.0.weight"
        assert value == (0.0 if spared else 0.5), name


def test_a_split_smaller_than_a_batch(store: Path, tmp_path: Path) -> None:
    config = make_config(data={"train_batch_size": 64}, trainer={"total_epochs": 1}, model={}, optim={})
    assert run(store, tmp_path, config)[0].steps == 1


def test_mixed_precision_keeps_float32_weights(store: Path, tmp_path: Path) -> None:
    config = make_config(model={"dtype": "bfloat16"}, data={}, optim={}, trainer={})
    result, speculator = run(store, tmp_path / "mixed", config)
    assert {parameter.dtype for parameter in speculator.parameters()} == {torch.float32}
    exact, _ = run(store, tmp_path / "exact")
    assert result.val["speculator_loss"] == pytest.approx(exact.val["speculator_loss"], rel=0.05)


def two_workers(store: Path, folder: Path) -> None:
    """What each of two processes runs; the first one writes down what came out."""
    torch.set_num_threads(1)
    workers.choose_device = lambda: torch.device("cpu")
    config = make_config(data={"train_batch_size": 5, "micro_batch_size_per_gpu": 2}, model={}, optim={}, trainer={})
    told: list[Progress] = []
    readers = [FeatureReader(Manifest.load(store / f"{split}.json"), store) for split in ("train", "val")]
    with joined() as me:
        speculator = make_speculator()
        result = train(config, speculator, *readers, me, Checkpoints(folder / "checkpoints", "key"), told.append)
        # Every worker has the same weights and the same opinion of them.
        torch.save(dict(speculator.named_parameters()), folder / f"weights-{me.rank}.pt")
        losses = [progress.metrics["speculator_loss"] for progress in told]
        (folder / f"result-{me.rank}.json").write_text(json.dumps([result.step, result.steps, result.val, losses]))


def test_two_workers_come_out_where_one_does(store: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    script = "import sys; from pathlib import Path; import test_loop; test_loop.two_workers(*map(Path, sys.argv[1:]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(store), str(tmp_path)],
            env={**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": paths},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    config = make_config(data={"train_batch_size": 5}, model={}, optim={}, trainer={})
    told: list[Progress] = []
    expected, speculator = run(store, tmp_path / "alone", config, listen=told.append)
    losses = [progress.metrics["speculator_loss"] for progress in told]
    for rank in range(2):
        weights = torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True)
        for name, parameter in speculator.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=0, atol=1e-5)
        step, steps, val, heard = json.loads((tmp_path / f"result-{rank}.json").read_text())
        assert (step, steps) == (expected.step, expected.steps)
        assert val == pytest.approx(expected.val, abs=1e-5)
        assert heard == (pytest.approx(losses, abs=1e-5) if rank == 0 else [])

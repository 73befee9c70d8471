"""train: what it leaves behind, where it starts, and what stops it."""

import csv
import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spec import config as config_module
from spec import files, heads, tracking
from spec.store import tables, upkeep
from spec.store.manifest import Manifest
from spec.store.reader import FeatureReader
from spec.training import loop
from stages import common
from tests.stages.workspace import content, ok, refused

MODEL, LAST = Path("models/speculator"), Path("models/speculator/last")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return heads.load(folder).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], weight) for name, weight in other.items())


def checkpoint(step: int) -> Path:
    (found,) = Path("checkpoints").glob(f"*/global_step_{step}")
    return found


def test_the_best_heads_and_the_last_ones_are_kept(folder: Path) -> None:
    said = ok("train", "trainer.save_freq=1", "trainer.test_freq=1", "optim.lr=0.3", "optim.schedule=constant")
    metrics = files.read_json(Path("results/train/details.json"))
    best, last = metrics["best_step"], metrics["steps"]
    assert best < last == 12
    assert f"train: best at step {best} of 12" in said
    assert same(weights(MODEL), weights(checkpoint(best)))
    assert same(weights(LAST), weights(checkpoint(last)))
    assert not same(weights(MODEL), weights(LAST))
    steps = {row["step"]: row["tokens_per_step"] for row in curve("val")}
    assert list(steps) == list(range(1, 13))
    assert max(steps, key=steps.__getitem__) == best
    assert metrics["val"]["tokens_per_step"] == steps[best]
    assert not list(Path("checkpoints").rglob("training.pt"))  # nothing is left to resume


def test_a_frozen_base_is_not_written_to(folder: Path, ready: Path) -> None:
    before = content(ready / "base")
    ok("train")
    ok("evaluate")
    assert content(ready / "base") == before
    assert list(content(Path("models/trained_base"))) == ["README"]
    assert "frozen" in Path("models/trained_base/README").read_text()
    trained, evaluated = (files.read_json(Path(f"results/{stage}/details.json")) for stage in ("train", "evaluate"))
    assert evaluated["decode"]["lossless"] is True
    digest = files.digest_file(MODEL / "pytorch_model.bin")  # by which an export finds the figures of its weights
    assert trained["speculator"] == evaluated["speculator"] == digest
    assert trained["features"] == Manifest.load(Path("data/features/train.json")).digest


def test_a_base_with_other_logits_has_no_distribution_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "logits", lambda kept: None)
    assert "from lm_head and state is not known here" in refused("train", "optim.loss=kl")
    ok("train")


def test_manifests_that_came_with_dvc_keep_their_segments_once_they_are_read(folder: Path) -> None:
    """The workspace is a copy: no stage wrote its manifests here."""
    root = common.store_root(config_module.load())
    paths = {split: common.features_path(split) for split in ("train", "val")}
    assert not any(upkeep.root_segments(root, path) for path in paths.values())
    ok("train", "trainer.total_epochs=1")
    for path in paths.values():
        manifest = Manifest.load(path)
        assert upkeep.root_segments(root, path) == manifest.needed(root)


def curve(split: str) -> list[dict[str, float]]:
    """A curve but for the times."""
    with Path(f"results/train/{split}.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if name != "time"} for row in csv.DictReader(file)]


def asked_to_stop_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """SIGTERM to this process, when the loop begins that step."""
    run = loop.run

    def with_signal(*args: Any) -> loop.Result:
        *others, stopping, advance = args
        begun = iter(range(1, 1000))

        def asked() -> bool:
            if next(begun) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return bool(stopping())

        return run(*others, asked, advance)

    patch.setattr(loop, "run", with_signal)


def test_a_signal_saves_and_the_same_command_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And everything comes out as without it, byte for byte."""
    ok("train", "trainer.test_freq=3")
    expected = content(Path("models")), curve("val")
    for name in ("models", "results/train", "checkpoints"):
        shutil.rmtree(name)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        asked_to_stop_at(4, patch)
        message = refused("train", "trainer.test_freq=3")
    assert "stopped at step 5 of 12, and saved in checkpoints/" in message
    assert "run the same command again to go on" in message
    assert signal.getsignal(signal.SIGTERM) == before
    assert (checkpoint(5) / "training.pt").is_file()
    assert not MODEL.exists()
    ok("train", "trainer.test_freq=3", "trainer.logger=[]", "trainer.experiment_name=other")  # of no influence
    assert (content(Path("models")), curve("val")) == expected


def test_a_disk_full_at_the_end_leaves_what_to_go_on_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "models/speculator/mlflow_run.json")

    with monkeypatch.context() as patch:
        patch.setattr(tracking.Run, "finish", full)
        assert "no space left on models/speculator/mlflow_run.json" in refused("train")
    assert (checkpoint(12) / "training.pt").is_file()
    assert "resuming at step 12" in ok("train")
    assert not list(Path("checkpoints").rglob("training.pt"))


def test_another_runs_checkpoint_is_not_taken_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files, "free_bytes", lambda path: 10)
        message = refused("train")
        assert "in checkpoints, where 10 B are free; free some, or move the project to a larger disk" in message
    with monkeypatch.context() as patch:
        asked_to_stop_at(4, patch)
        refused("train")
    ok("train", "trainer.seed=1")
    assert len(list(Path("checkpoints").iterdir())) == 2
    expected = content(MODEL)
    shutil.rmtree("checkpoints")
    ok("train", "trainer.seed=1")
    assert content(MODEL) == expected


def test_the_draft_vocabulary_is_what_answers_hold_most(folder: Path) -> None:
    ok("train", "model.speculator.draft_vocab_size=9", "trainer.total_epochs=1")
    manifest = Manifest.load(common.features_path("train"))
    counts = FeatureReader(manifest, common.store_root(config_module.load())).token_counts()
    chosen = heads.load(MODEL).token_map.tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 9
    assert min(counts[chosen]) >= max(np.delete(counts, chosen))


def test_training_goes_on_from_a_checkpoint(folder: Path) -> None:
    ok("train", "trainer.total_epochs=1")
    shutil.copytree(MODEL, "earlier")
    ok("train", "model.speculator.init=earlier", "trainer.total_epochs=1", "optim.lr=1e-12")
    for name, weight in weights(MODEL).items():
        torch.testing.assert_close(weight, weights(Path("earlier"))[name], rtol=0, atol=1e-6)
    for override, words in (
        ("model.speculator.inner_dim=25", "earlier has inner_dim (24,), and the parameters ask for (25,)"),
        ("model.speculator.n_predict=2", "earlier has n_predict 3, and the parameters ask for 2"),
        ("model.speculator.init=nowhere", 'neither "random", "base" nor a checkpoint folder'),
    ):
        assert words in refused("train", "model.speculator.init=earlier", override)

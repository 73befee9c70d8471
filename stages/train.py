"""train: heads from cached features, on one worker or many."""

from __future__ import annotations

import csv
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spec import files, heads, plots, tracking
from spec.config import Config, Speculator, flatten
from spec.errors import SpecError
from spec.heads import SpeculatorConfig
from spec.store import features
from spec.store.manifest import Manifest
from spec.store.reader import FeatureReader
from spec.training import loop
from spec.training.resume import Checkpoints
from spec.workers import Worker, joined
from stages import common

log = logging.getLogger(__name__)

CHECKPOINTS = Path("checkpoints")
RESULTS = Path("results/train")
_NO_INFLUENCE = {
    "features.store",
    "trainer.experiment_name",
    "trainer.launcher",
    "trainer.logger",
    "trainer.tracking_uri",
}


@common.worker_option
@common.stage
def train(config: Config, worker: Path | None) -> None:
    """Train the heads; the best on val go to models/speculator, curves and metrics to results/train."""
    manifests = {split: common.open_manifest(config, split) for split in ("train", "val")}
    shape = speculator_config(config.model.speculator, manifests["train"])
    if worker is not None:
        with joined() as me:
            _work(config, shape, manifests, me)
        return
    for split, manifest in manifests.items():
        FeatureReader(manifest, common.store_root(config))  # complains about a store that lacks something
        if not manifest.positions:
            raise SpecError(f"{common.features_path(split)} has no position to train on: no token of it is supervised")
    with torch.device("meta"):
        count = heads.build(shape, _placeholder_map(shape)).num_parameters()
    positions = manifests["train"].positions
    common.say(
        f"train: {shape.method} with {shape.n_predict} heads, {count / 1e6:.1f} M parameters, "
        f"{positions:,} positions x {config.trainer.total_epochs} epochs"
    )
    common.need_space(CHECKPOINTS, 24 * count, "train")
    with common.using_store(config):
        common.run_workers(config, "stages.train", {})
    metrics = files.read_json(RESULTS / "metrics.json")
    size = common.size((common.MODEL / "pytorch_model.bin").stat().st_size)
    common.say(
        f"train: best at step {metrics['best_step']} of {metrics['steps']}, "
        f"{metrics['val']['tokens_per_step']:.3f} tokens per step on val -> {common.MODEL} ({size})"
    )


def speculator_config(params: Speculator, manifest: Manifest) -> SpeculatorConfig:
    """The network that params ask for, on the base that the features come from.

    Raises:
        SpecError: values that make no network on this base.
    """
    try:
        return SpeculatorConfig(
            method=params.method,
            hidden_size=manifest.hidden_size,
            vocab_size=manifest.vocab_size,
            n_predict=params.n_predict,
            inner_dim=params.inner_dim,
            emb_dim=params.emb_dim,
            proj_dim=params.proj_dim,
            scale_input=params.scale_input,
            tie_weights=params.tie_weights,
            tie_lstm_embs=params.tie_lstm_embs,
            draft_vocab_size=params.draft_vocab_size,
            base_model_name_or_path=manifest.base["name"],
            base_revision=manifest.base["revision"],
            base_digest=manifest.base["weights"],
        )
    except ValueError as error:
        raise SpecError(f"model.speculator: {error}") from None


def _placeholder_map(shape: SpeculatorConfig) -> torch.Tensor | None:
    return None if shape.draft_vocab_size is None else torch.arange(shape.draft_vocab_size, device="cpu")


def _work(config: Config, shape: SpeculatorConfig, manifests: dict[str, Manifest], me: Worker) -> None:
    """This worker's part; the first one logs and writes."""
    readers = {split: FeatureReader(manifest, common.store_root(config)) for split, manifest in manifests.items()}
    speculator = initialise(config, shape, readers["train"]).to(me.device)
    relevant = {key: value for key, value in flatten(config).items() if key not in _NO_INFLUENCE}
    digests = {split: manifest.digest for split, manifest in manifests.items()}
    key = files.digest_json({"params": relevant, "features": digests})
    checkpoints = Checkpoints(CHECKPOINTS / key[:12], key)
    if not me.first:
        loop.train(config, speculator, readers["train"], readers["val"], me, checkpoints)
        return
    began = time.monotonic()
    run = tracking.Run(config, "train", {"features": digests["train"], "method": shape.method})
    recorder = _Recorder(run)
    try:
        result = loop.train(config, speculator, readers["train"], readers["val"], me, checkpoints, recorder.listen)
        result.restore(speculator)
        heads.save(speculator, common.MODEL)
        tracking.keep_run(common.MODEL, run, tracking.tracking_uri(config))
        recorder.close()
        last = recorder.rows["train"][-1] if recorder.rows["train"] else {}
        files.write_json(
            RESULTS / "metrics.json",
            {
                "speculator_loss": last.get("speculator_loss"),
                "val": result.val,
                "best_step": result.step,
                "steps": result.steps,
                "parameters": speculator.num_parameters(),
                "positions": manifests["train"].positions,
                "seconds": round(time.monotonic() - began, 1),
            },
        )
        recorder.draw(RESULTS)
        run.log({f"best.{name}": value for name, value in result.val.items()}, result.step)
        run.artifacts(RESULTS, "train")
        run.artifacts(common.MODEL, "speculator")
        checkpoints.finish()
        run.finish()
    except BaseException:
        run.finish("FAILED")
        raise


def initialise(config: Config, shape: SpeculatorConfig, reader: FeatureReader) -> heads.Speculator:
    """A speculator with its first weights: random, the base's tables, or an earlier checkpoint's.

    Raises:
        SpecError: a checkpoint that is missing or of another shape.
    """
    init = config.model.speculator.init
    token_map = _frequent_tokens(reader, shape.draft_vocab_size) if shape.draft_vocab_size else None
    if init in ("random", "base"):
        speculator = heads.build(shape, token_map)
        if init == "base" or shape.method == "medusa":
            tables = features.load_tables(reader.collection)
            heads.init_from_base(speculator, tables["embedding"], tables["lm_head"], config.trainer.seed)
        else:
            heads.init_random(speculator, config.trainer.seed)
        return speculator
    folder = Path(init)
    if not folder.is_dir():
        raise SpecError(f'model.speculator.init: {init!r} is neither "random", "base" nor a checkpoint folder')
    try:
        speculator = heads.load(folder, dtype=torch.float32)
        heads.check_base(speculator.config, shape.vocab_size, shape.hidden_size, "", allow_other_weights=True)
    except (heads.CheckpointError, OSError) as error:
        raise SpecError(f"model.speculator.init: {error}") from None
    for name in ("method", "n_predict", "inner_dim", "emb_dim", "proj_dim", "draft_vocab_size", "tie_weights"):
        found, asked = getattr(speculator.config, name), getattr(shape, name)
        if found != asked:
            raise SpecError(f"model.speculator.init: {folder} has {name} {found}, and the parameters ask for {asked}")
    warm = heads.build(shape, speculator.token_map)
    warm.load_state_dict(speculator.state_dict())
    return warm


def _frequent_tokens(reader: FeatureReader, count: int) -> torch.Tensor:
    """The `count` most frequent supervised tokens of a split, by id; ties go to the lower id."""
    frequency = reader.token_counts()
    return torch.from_numpy(np.sort(np.argsort(-frequency, kind="stable")[:count]))


class _Recorder:
    """Shows progress and keeps it: a bar, curves as CSV, MLflow."""

    def __init__(self, run: tracking.Run) -> None:
        self.run = run
        self.rows: dict[str, list[dict[str, float]]] = {"train": [], "val": []}
        self.bar: Any = None
        shutil.rmtree(RESULTS, ignore_errors=True)
        RESULTS.mkdir(parents=True)

    def listen(self, progress: loop.Progress) -> None:
        """Take up one logged step."""
        if self.bar is None:
            self.bar = common.progress(progress.total, "steps", "train")
        self.bar.update(progress.step - self.bar.n)
        metrics = progress.metrics
        self.rows[progress.split].append({"step": progress.step, **metrics})
        self._write(progress.split)
        prefix = "" if progress.split == "train" else "val."
        self.run.log({f"{prefix}{name}": value for name, value in metrics.items()}, progress.step)
        if progress.split == "train":
            rate = f"{metrics['positions_per_second']:,.0f} positions/s"
            accuracy = " ".join(f"{v:.2f}" for k, v in metrics.items() if k.startswith("accuracy."))
            self.bar.set_postfix_str(
                f"speculator_loss {metrics['speculator_loss']:.3f}, accuracy {accuracy}, {rate}", refresh=False
            )
        else:
            self.bar.write(
                f"step {progress.step}: val loss {metrics['speculator_loss']:.3f}, "
                f"{metrics['tokens_per_step']:.3f} tokens per step"
            )

    def _write(self, split: str) -> None:
        rows = self.rows[split]
        with (RESULTS / f"{split}.csv").open("a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[-1]))
            if len(rows) == 1:
                writer.writeheader()
            writer.writerow(rows[-1])

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()

    def draw(self, folder: Path) -> None:
        """The curves as pictures."""

        def line(split: str, name: str) -> tuple[list[float], list[float]]:
            rows = self.rows[split]
            return [row["step"] for row in rows], [row[name] for row in rows]

        if not self.rows["train"] or not self.rows["val"]:
            return
        losses = {split: line(split, "speculator_loss") for split in ("train", "val")}
        plots.curves(folder / "loss.png", losses, "step", "speculator loss")
        names = [name for name in self.rows["train"][-1] if name.startswith("accuracy.")]
        accuracy = {f"head {name.split('.')[1]}": line("train", name) for name in names}
        plots.curves(folder / "accuracy.png", accuracy, "step", "accuracy (true inputs)")
        plots.curves(folder / "tokens_per_step.png", {"val": line("val", "tokens_per_step")}, "step", "tokens per step")


if __name__ == "__main__":
    train()

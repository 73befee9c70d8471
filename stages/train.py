"""train: heads from cached features, on one worker or many."""

from __future__ import annotations

import csv
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spec import base as base_model
from spec import corpus, drafting, files, heads, lookup, plots, tracking
from spec.config import Config, flatten
from spec.errors import SpecError
from spec.heads import SpeculatorConfig
from spec.record import RUN_FILE
from spec.store import locks
from spec.store.manifest import Manifest
from spec.store.reader import FeatureReader
from spec.store.tables import Tables
from spec.training import loop, mixing, start
from spec.training.frozen import FrozenTask
from spec.training.joint import JointTask
from spec.training.resume import Checkpoints
from spec.workers import Worker, joined
from stages import common

CHECKPOINTS = Path("checkpoints")
RESULTS = common.TRAIN_RESULTS
_NO_INFLUENCE = (
    "data.eval_files",
    "decode.",  # what is added to the best heads once they are trained
    "evaluate.",
    "features.store",
    "trainer.experiment_name",
    "trainer.launcher",
    "trainer.logger",
    "trainer.tracking_uri",
)
"""Prefixes of the keys that do not change the result of training; a checkpoint belongs to all other keys."""
_WRITTEN = ("train.csv", "val.csv", "metrics.json", common.DETAILS, "loss.png", "accuracy.png", "tokens_per_step.png")
"""The files that this stage writes into results/train; others there are left alone."""

_MARK = common.TRAINED_BASE / "README"
_MADE = "Written by the train stage: the base where it was trained too, and nothing else where it was frozen."
"""The first words of models/trained_base/README, which mark the folder as this stage's."""

_OF_TRAINING = ("lr", "grad_norm", "epoch", "positions_seen", "positions_per_second", "data_wait", "memory_gb")
_LOSSES = {"speculator_loss": "loss", "base_loss": "base_loss"}
_CURVES = {
    "train": {column: f"curves/{name}" for column, name in _LOSSES.items()}
    | {name: f"training/{name}" for name in _OF_TRAINING},
    "val": {"tokens_per_step": "curves/tokens_per_step"}
    | {column: f"curves/val_{name}" for column, name in _LOSSES.items()},
}
"""The columns of train.csv and val.csv that are curves in MLflow, which sorts them by their names there."""


@common.worker_option
@common.stage
def train(config: Config, worker: Path | None) -> None:
    """Train the heads; the best on val go to models/speculator, curves and metrics to results/train."""
    manifests = {split: common.open_manifest(config, split) for split in ("train", "val")}
    shape = start.shape_on(config.model.speculator, manifests["train"])
    if config.model.freeze_base_model:
        manifests = {split: manifest.reading(shape.taps(shape.layers)) for split, manifest in manifests.items()}
    if worker is not None:
        with joined() as me:
            _work(config, shape, manifests, me)
        return
    joint = not config.model.freeze_base_model
    for split, manifest in manifests.items():
        if joint:
            common.check_joint(manifest, split)
            continue
        FeatureReader(manifest, common.store_root(config)).check()
        if not manifest.positions:
            raise SpecError(f"{common.features_path(split)} has no position to train on: no token of it is supervised")
    held = common.TRAINED_BASE.is_dir() and any(common.TRAINED_BASE.iterdir())
    if held and not (_MARK.is_file() and _MARK.read_text().startswith(_MADE)):
        raise SpecError(f"{common.TRAINED_BASE} holds something that this stage has not written; move it away")
    token_map = None if shape.draft_vocab_size is None else torch.arange(shape.draft_vocab_size)
    with torch.device("meta"):
        count = heads.build(shape, token_map).num_parameters()
    what = "jointly with the base" if joint else f"{manifests['train'].positions:,} positions"
    common.say(
        f"train: {shape.method} with {shape.n_predict} heads, {count / 1e6:.1f} M parameters, {what} x "
        f"{config.trainer.total_epochs} epochs"
    )
    trained = count
    if joint:
        folder = common.base_folder(config, common.read_sources())
        trained += int(base_model.skeleton(folder, config.model.trust_remote_code).num_parameters())
    # Of each parameter its weight, two moments and its best weight, in the newest state and in the one that it replaces
    common.need_space(CHECKPOINTS, 32 * trained + 8 * count, "train", "move the project to a larger disk")
    with locks.in_use(common.store_root(config)):
        common.run_workers(config, "stages.train", {})
    metrics = files.read_json(RESULTS / common.DETAILS)
    size = common.size((common.MODEL / heads.WEIGHTS).stat().st_size)
    common.say(
        f"train: best at step {metrics['best_step']} of {metrics['steps']}, "
        f"{metrics['val']['tokens_per_step']:.3f} tokens per step on val -> {common.MODEL} ({size})"
    )


def _work(config: Config, shape: SpeculatorConfig, manifests: dict[str, Manifest], me: Worker) -> None:
    """This worker's part; the first one logs and writes."""
    frozen = config.model.freeze_base_model
    task = _frozen(config, shape, manifests, me) if frozen else _joint_task(config, shape, me)
    relevant = {key: value for key, value in flatten(config).items() if not key.startswith(_NO_INFLUENCE)}
    # The order of sequences follows from how they are grouped into segments, so a run belongs to the very files.
    placed = {split: files.digest_file(common.features_path(split)) for split in manifests}
    key = files.digest_json({"params": relevant, "features": placed, "state": 2})
    checkpoints = Checkpoints(CHECKPOINTS / key[:12], key)
    stopping = threading.Event()  # the loop asks for it at every step, saves, and leaves
    with common.on_signals(lambda _: stopping.set(), signal.SIGTERM):
        if not me.first:
            loop.run(task, checkpoints, stopping=stopping.is_set)
            return
        began = time.monotonic()
        sources = common.read_sources() if common.SOURCES.is_file() else {"base": manifests["train"].base}
        tags = {"method": shape.method, "hardware.workers": str(me.world), "features": manifests["train"].digest}
        tags |= {f"features.{split}": manifest.digest for split, manifest in manifests.items()}
        run = tracking.Run(config, "train", tags, sources, ("train", "val"), me.device)
        recorder = _Recorder(run)
        try:
            result = loop.run(task, checkpoints, recorder.listen, stopping.is_set, recorder.advance)
            _keep(task, result)
            _teach_drafting(task, config)
            recorder.close()
            last = recorder.rows["train"][-1] if recorder.rows["train"] else {}
            figures = {"val": round(result.val["tokens_per_step"], 3), "seconds": round(time.monotonic() - began, 1)}
            details = {
                "speculator_loss": last.get("speculator_loss"),
                "val": result.val,
                "best_step": result.step,
                "steps": result.steps,
                "parameters": task.speculator.num_parameters(),
                "positions": manifests["train"].positions,
                "features": manifests["train"].digest,
                "checkpoints": str(checkpoints.folder),
                "speculator": files.digest_file(common.MODEL / heads.WEIGHTS),
                "seconds": figures["seconds"],
                "positions_per_second": last.get("positions_per_second"),
            }
            files.write_json(RESULTS / common.DETAILS, details)
            files.write_json(RESULTS / "metrics.json", figures)
            recorder.draw()
            of_cache = common.CACHE_RESULTS / "metrics.json"
            cached = files.read_json(of_cache) if of_cache.is_file() else {}
            run.finish(
                common.MODEL,
                metrics={"answers": len(task.order(0)), **figures, **cached},
                step=result.step,
                description=f"{shape.method}, {shape.n_predict} heads, best at step {result.step} of {result.steps}",
                curves=recorder.curves(),
                artifacts={str(RESULTS / name): "train" for name in sorted(_WRITTEN) if (RESULTS / name).is_file()},
                model=[str(common.MODEL / name) for name in (heads.CONFIG, heads.WEIGHTS)],
            )
            checkpoints.finish()  # last: a full disk above leaves the state to go on from
        except BaseException as error:
            status = "KILLED" if isinstance(error, loop.StoppedError) else "FAILED"
            run.finish(RESULTS, status, curves=recorder.curves())
            raise


def _frozen(config: Config, shape: SpeculatorConfig, manifests: dict[str, Manifest], me: Worker) -> FrozenTask:
    train, val = (FeatureReader(manifests[split], common.store_root(config)) for split in ("train", "val"))
    tables = Tables(train.tables)
    speculator = start.initialise(config, shape, train.token_counts(), tables).to(me.device)
    teacher = tables.teacher() if config.optim.loss == "kl" else None
    if teacher is None and config.optim.loss == "kl":
        raise SpecError(
            f"optim.loss=kl: how {manifests['train'].base['name']} makes logits from lm_head and state is not known "
            "here (a bias, a scale and a cap are known); use optim.loss=ce"
        )
    return FrozenTask(config, speculator, train, val, me, teacher)


def _joint_task(config: Config, shape: SpeculatorConfig, me: Worker) -> JointTask:
    torch.manual_seed(config.trainer.seed)  # of the base's dropout
    sources = common.read_sources()
    folder, source = common.base_folder(config, sources), sources["base"]
    base = base_model.load(config.model, folder, source["weights"], dtype="float32")
    rows = {split: corpus.read(common.responses_path(split)) for split in ("train", "val")}
    if not base_model.has_linear_logits(base, [row.ids for row in rows["train"]]):
        raise SpecError(
            f"{source['name']}: its logits are more than its lm_head times its state (a bias, a scale, a cap); joint "
            "training does not support such bases: set model.freeze_base_model to true"
        )
    counts = np.zeros(shape.vocab_size, np.int64)
    for row in rows["train"]:
        counts += np.bincount(row.ids[row.mask != 0], minlength=shape.vocab_size)
    tables = {name: table.cpu() for name, table in base.tables.items()}
    speculator = start.initialise(config, shape, counts, tables)
    return JointTask(config, base, speculator.to(me.device), rows["train"], rows["val"], me)


def _keep(task: FrozenTask | JointTask, result: loop.Result) -> None:
    """models/speculator holds the best heads, models/speculator/last those of the last step, models/trained_base the
    base of the best step where it was trained."""
    for name in (heads.WEIGHTS, heads.CONFIG):
        files.remove(common.MODEL / "last" / name)
    task.tensors()  # brings the speculator up to date
    if isinstance(task, FrozenTask):  # of joint training, the base that the last heads belong to is not kept
        heads.save(task.speculator, common.MODEL / "last")
    task.restore(result.weights)
    with files.whole(common.TRAINED_BASE, folder=True) as folder:
        (folder / _MARK.name).write_text(f"{_MADE} data/sources.json names the base that it began with.\n")
        if isinstance(task, JointTask):
            task.base.model.to(getattr(torch, task.config.model.dtype)).save_pretrained(folder)
            task.base.tokenizer.save_pretrained(folder)
    if isinstance(task, JointTask):
        digest = base_model.identify(common.TRAINED_BASE, task.config.model.trust_remote_code)["weights"]
        base = {"base_model_name_or_path": str(common.TRAINED_BASE), "base_revision": None, "base_digest": digest}
        task.speculator.config = task.speculator.config.model_copy(update=base)
    heads.save(task.speculator, common.MODEL)


def _teach_drafting(task: FrozenTask | JointTask, config: Config) -> None:
    """Add to the checkpoint what drafting uses besides the heads: the index of the training answers, and the mixer's
    weights, for which joint training has no states of val."""
    digest = None
    files.remove(common.MODEL / lookup.FILE)
    if config.decode.lookup_mb:
        digest = lookup.write(common.MODEL / lookup.FILE, task.answers(), config.decode.lookup_mb)
    found: dict[str, Any] = {"lookup": digest}
    if isinstance(task, FrozenTask):
        index = drafting.open_lookup(common.MODEL, task.speculator.config.model_copy(update=found))
        found["mixer"] = mixing.fit(task.speculator, task.val_reader, config.decode, index)
    task.speculator.config = task.speculator.config.model_copy(update=found)
    files.write_json(common.MODEL / heads.CONFIG, task.speculator.config.to_json())


class _Recorder:
    """Shows progress and keeps it: a bar, curves as CSV, MLflow."""

    def __init__(self, run: tracking.Run) -> None:
        self.run = run
        self.rows: dict[str, list[dict[str, float]]] = {"train": [], "val": []}
        self.bar: Any = None
        RESULTS.mkdir(parents=True, exist_ok=True)
        for name in (*_WRITTEN, RUN_FILE):
            files.remove(RESULTS / name)

    def advance(self, step: int, total: int) -> None:
        """Show the progress."""
        if self.bar is None:
            self.bar = common.progress(total, "steps", "train", done=step)
        self.bar.update(step - self.bar.n)

    def listen(self, progress: loop.Progress) -> None:
        """Record and show one logged step."""
        self.advance(progress.step, progress.total)
        split, metrics = progress.split, progress.metrics
        row = {"step": progress.step, "time": round(progress.time, 3), **metrics}
        with (RESULTS / f"{split}.csv").open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if not self.rows[split]:
                writer.writeheader()
            writer.writerow(row)
        self.rows[split].append(row)
        self.run.log(row, _CURVES[split])
        loss = f"{metrics['speculator_loss']:.3f}"
        if split == "train":
            accuracy = " ".join(f"{v:.2f}" for k, v in metrics.items() if k.startswith("accuracy."))
            rate = f"{metrics['positions_per_second']:,.0f} positions/s"
            self.bar.set_postfix_str(f"speculator_loss {loss}, accuracy {accuracy}, {rate}", refresh=False)
        else:
            steps = f"{metrics['tokens_per_step']:.3f} tokens per step"
            self.bar.write(f"step {progress.step}: val loss {loss}, {steps}")

    def curves(self) -> dict[str, dict[str, str]]:
        """The files that were written, and what MLflow shows of them."""
        return {str(RESULTS / f"{split}.csv"): _CURVES[split] for split, rows in self.rows.items() if rows}

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()

    def draw(self) -> None:
        """The curves as pictures."""

        def line(split: str, name: str) -> tuple[list[float], list[float]]:
            return [row["step"] for row in self.rows[split]], [row[name] for row in self.rows[split]]

        if not all(self.rows.values()):
            return
        losses = {split: line(split, "speculator_loss") for split in self.rows}
        plots.curves(RESULTS / "loss.png", losses, "step", "speculator loss")
        names = [name for name in self.rows["train"][-1] if name.startswith("accuracy.")]
        accuracy = {f"head {name.split('.')[1]}": line("train", name) for name in names}
        plots.curves(RESULTS / "accuracy.png", accuracy, "step", "accuracy (true inputs)")
        steps = {"val": line("val", "tokens_per_step")}
        plots.curves(RESULTS / "tokens_per_step.png", steps, "step", "tokens per step")


if __name__ == "__main__":
    train()

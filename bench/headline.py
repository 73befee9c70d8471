"""What a fine-tune of the base costs its speculator, and what brings it back: `make headline`.

1. A speculator of the embedded base is trained and measured (A). The base is fine-tuned on worked maths solutions, or a
   fine-tuned one is given (--finetuned). The same speculator is measured on the fine-tuned base's own answers to the
   same eval prompts (B), and again after a few minutes of training on some more of its answers (C), beside a
   speculator that starts afresh on them. N-gram lookup stands beside each.
2. Ten heads from the one pass of the base that part 1 made.

Every step is a stage of the pipeline, run in a scratch folder (--folder keeps it); every figure of acceptance comes
from the stages' results. Answers of the original base are taken from the user's store where `make repro` has left
them; states are computed anew, in a store of the scratch folder, so that the pass can be timed.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench.common import machine, table
from spec import base, corpus, files, heads
from stages import common

DOMAIN = "maths"
"""What the base is fine-tuned on: the one domain whose every prompt has a worked solution."""

FINETUNE = (
    "model.freeze_base_model=false",
    "model.speculator_loss_coeff=0",  # as a fine-tune that knows nothing of speculators
    "model.speculator.n_predict=1",
    "model.speculator.draft_vocab_size=512",
    "optim.loss=ce",
    "trainer.total_epochs=2",
    "trainer.test_freq=1000",
)
SMALL = ("trainer.logger=console", "evaluate.max_prompts=1", "evaluate.max_new_tokens=16")
"""The walk is exact without decoding for real, so as little as may be is decoded."""

HEADS: Sequence[tuple[str, int, int]] = (
    *(("sum_rnn", n, width) for n in (2, 3, 5) for width in (288, 576)),
    *(("sum_lstm", n, width) for n in (3, 5) for width in (288, 576)),
)
"""method, n_predict, widths."""


@dataclass(frozen=True)
class Space:
    """A folder in which stages run."""

    root: Path
    overrides: tuple[str, ...]  # of params.yaml, for every stage

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)

    def run(self, *stages: str, overrides: Sequence[str] = ()) -> float:
        """Run stages; the seconds of the last one, its start included."""
        seconds = 0.0
        for stage in stages:
            print(f"\n== {self.root.name}: {stage} {' '.join(overrides)}", flush=True)
            command = [sys.executable, "-m", f"stages.{stage}", "--params", str(common.PROJECT / "params.yaml")]
            command += [part for override in (*self.overrides, *overrides) for part in ("-S", override)]
            began = time.perf_counter()
            subprocess.run(command, cwd=self.root, env=common.child_environment(), check=True)
            seconds = time.perf_counter() - began
        return seconds

    def json(self, path: Path | str) -> Any:
        return files.read_json(self.root / path)

    @property
    def speculator(self) -> Path:
        return self.root / common.MODEL

    def measured(self, trained: bool = True) -> dict[str, Any]:
        """What evaluate found, and the seconds of training where any came before it."""
        seconds = self.json("results/train/details.json")["seconds"] if trained else None
        return {"train_seconds": seconds, **self.json("results/evaluate/details.json")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep everything in this folder")
    parser.add_argument("--speculator", type=Path, help="of the embedded base, instead of training one")
    parser.add_argument("--finetuned", type=Path, help="a fine-tune of the embedded base, instead of making one")
    parser.add_argument("--samples", type=int, default=384, help="prompts of the original speculator")
    parser.add_argument("--epochs", type=int, default=5, help="its passes over their answers, and the warm start's")
    parser.add_argument("--finetune-samples", type=int, default=96, help="solutions that the base is fine-tuned on")
    parser.add_argument("--base-lr", type=float, default=1e-4, help="of the fine-tune")
    parser.add_argument("--own", type=int, default=128, help="prompts that the fine-tuned base answers to train on")
    parser.add_argument("--own-lr", type=float, default=2e-4, help="of the warm start; a fresh one has params.yaml's")
    parser.add_argument("--head-epochs", type=int, default=1, help="passes of each of the ten heads")
    chosen = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(prefix="headline-", dir=".") as scratch:
        root = (chosen.folder or Path(scratch)).resolve()
        found: dict[str, Any] = {"chosen": {key: str(value) for key, value in vars(chosen).items()}}
        finetune(root, chosen, found)
        report_finetune(found)
        several(root, chosen, found)
        report_heads(found)
        files.write_json(root / "headline.json", found)


def finetune(root: Path, chosen: argparse.Namespace, found: dict[str, Any]) -> None:
    """Part 1."""
    own_store = f"features.store={root}/store"
    before = Space(root / "original", (*SMALL, f"data.max_samples={chosen.samples}"))
    before.run("fetch", "tokenize", "respond")
    before = replace(before, overrides=(*before.overrides, own_store))
    found["pass"] = {"seconds": before.run("cache"), **before.json("results/cache/details.json")}
    if chosen.speculator:
        shutil.copytree(chosen.speculator, before.speculator, dirs_exist_ok=True)
    else:
        before.run("train", overrides=[f"trainer.total_epochs={chosen.epochs}", "trainer.test_freq=32"])
    before.run("evaluate")
    found["A"] = before.measured(trained=not chosen.speculator)

    tuned_base = chosen.finetuned.resolve() if chosen.finetuned else tune(root, chosen, before, found)
    own = (f"data.max_samples={chosen.own}", f"model.partial_pretrain={tuned_base}")
    after = Space(root / "finetuned", (*SMALL, own_store, *own))
    after.run("fetch", "tokenize")
    found["respond_seconds"] = after.run("respond")
    found["cache_seconds"] = after.run("cache")
    found["answers"] = compare(before, after)
    relabel(before.speculator, after.speculator, tuned_base)
    after.run("evaluate")
    found["B"] = after.measured(trained=False)
    training = [f"trainer.total_epochs={chosen.epochs}", "trainer.test_freq=8"]
    warm = [f"model.speculator.init={before.speculator}", f"optim.lr={chosen.own_lr}"]
    for name, start in (("C", warm), ("fresh", [])):
        after.run("train", "evaluate", overrides=[*training, *start])
        found[name] = after.measured()


def tune(root: Path, chosen: argparse.Namespace, before: Space, found: dict[str, Any]) -> Path:
    """The base, fine-tuned on worked solutions in joint mode; its folder."""
    data = root / "solutions"
    data.mkdir(exist_ok=True)
    for split in common.SPLITS:
        rows = pq.read_table(before.root / f"data/prompts/{split}.parquet").to_pylist()
        solved = [row for row in rows if row["domain"] == DOMAIN and row["answer"]]
        pq.write_table(pa.Table.from_pylist(solved), data / f"{split}.parquet")
    given = [f"data.{split}_files={data}/{split}.parquet" for split in common.SPLITS]
    given += [f"data.max_samples={chosen.finetune_samples}", f"optim.base_lr={chosen.base_lr}"]
    space = Space(root / "tuning", (*before.overrides, *FINETUNE, *given))
    space.run("fetch", "tokenize", "respond", "cache", "train")
    details = space.json("results/train/details.json")
    with (space.root / "results/train/train.csv").open() as file:
        losses = [float(row["base_loss"]) for row in csv.DictReader(file)]
    found["tune"] = {name: details[name] for name in ("seconds", "steps")}
    found["tune"] |= {"loss_first": losses[0], "loss_last": losses[-1], "val_loss": details["val"]["base_loss"]}
    return space.root / common.TRAINED_BASE


def relabel(source: Path, target: Path, tuned: Path) -> None:
    """The speculator as if it had been trained on the fine-tune: evaluate refuses other weights than its own base's."""
    speculator = heads.load(source)
    digest = base.identify(tuned)["weights"]
    named = {"base_model_name_or_path": str(tuned), "base_revision": None, "base_digest": digest}
    speculator.config = speculator.config.model_copy(update=named)
    heads.save(speculator, target)


def compare(before: Space, after: Space) -> dict[str, float]:
    """How far the two bases' answers to the eval prompts differ."""
    splits = [corpus.read(space.root / common.responses_path("eval")) for space in (before, after)]
    answers = [{row.ids[: row.prompt_length].tobytes(): row.ids[row.prompt_length :] for row in s} for s in splits]
    both = [(answers[0][key], answers[1][key]) for key in answers[0].keys() & answers[1].keys()]
    return {
        "prompts": len(both),
        "same": sum(one.tolist() == other.tolist() for one, other in both),
        "tokens_before": sum(len(one) for one, _ in both) / len(both),
        "tokens_after": sum(len(other) for _, other in both) / len(both),
    }


def several(root: Path, chosen: argparse.Namespace, found: dict[str, Any]) -> None:
    """Part 2: heads from the states that part 1 cached; val chooses one, and eval says what that one does."""
    space = Space(root / "heads", (*SMALL, f"features.store={root}/store", f"data.max_samples={chosen.samples}"))
    shutil.copytree(root / "original/data", space.root / "data", symlinks=True, dirs_exist_ok=True)
    space.run("fetch")  # brings the base, which evaluate decodes with
    found["heads"] = []
    for method, n, width in HEADS:
        overrides = [f"model.speculator.method={method}", f"model.speculator.n_predict={n}"]
        overrides += [f"model.speculator.{name}={width}" for name in ("inner_dim", "emb_dim", "proj_dim")]
        overrides += [f"trainer.total_epochs={chosen.head_epochs}", "trainer.test_freq=1000"]
        wall = space.run("train", overrides=overrides)
        metrics = space.json("results/train/details.json")
        row = {"method": method, "n": n, "width": width, "wall": wall, **metrics}
        if not found["heads"] or row["val"]["tokens_per_step"] > found["best"]["val"]["tokens_per_step"]:
            found["best"] = row
            shutil.rmtree(root / "best", ignore_errors=True)
            shutil.copytree(space.speculator, root / "best")
        found["heads"].append(row)
    shutil.rmtree(space.speculator)
    shutil.copytree(root / "best", space.speculator)
    space.run("evaluate")
    found["best_on_eval"] = space.json("results/evaluate/details.json")


def report_finetune(found: dict[str, Any]) -> None:
    """Part 1's table."""
    print("\n## A fine-tune and its speculator\n")
    if "tune" in found:
        tuned = found["tune"]
        print(
            f"fine-tune: {tuned['steps']} steps, loss on train {tuned['loss_first']:.2f} (its first 10 steps) to "
            f"{tuned['loss_last']:.2f} (its last), on val {tuned['val_loss']:.2f}; {tuned['seconds']:.0f} s"
        )
    answers = found["answers"]
    print(
        f"eval: {answers['same']} of {answers['prompts']} answers are the same from both bases; on average "
        f"{answers['tokens_before']:.0f} tokens before, {answers['tokens_after']:.0f} after"
    )
    own = f"respond {found['respond_seconds']:.0f} s, cache {found['cache_seconds']:.0f} s, eval included"
    print(f"own answers: {own}\n")
    names = {
        "A": "A: its speculator, on the base it was trained for",
        "B": "B: the same, on the fine-tuned base",
        "C": "C: the same, after a warm start on own answers",
        "fresh": "instead of C: a fresh one, same answers and steps",
    }
    rows = []
    for key, name in names.items():
        one = found[key]
        maths = one["domains"][DOMAIN]
        figures = [one["ngram"]["tokens_per_step"], one["hybrid"]["tokens_per_step"]]
        figures += [maths["tokens_per_step"], maths["ngram_tokens_per_step"]]
        seconds = "" if one["train_seconds"] is None else f"{one['train_seconds']:.0f} s"
        rows.append([name, with_interval(one["offline"]), *(f"{figure:.2f}" for figure in figures), seconds])
    header = ["tokens per step on eval", "head (95 % interval)", "n-gram", "hybrid"]
    table([*header, f"head, {DOMAIN}", f"n-gram, {DOMAIN}", "training"], rows)


def report_heads(found: dict[str, Any]) -> None:
    """Part 2's table."""
    print("\n## Ten heads from one pass of the base\n")
    once = found["pass"]
    tokens = sum(once[split]["tokens"] for split in common.SPLITS)
    total = sum(row["seconds"] for row in found["heads"])
    print(f"the pass, once: {tokens:,} tokens, {once['seconds']:.0f} s; the heads together: {total:.0f} s\n")
    rows = []
    for row in found["heads"]:
        shown = [f"{row['parameters'] / 1e6:.1f} M", f"{row['seconds']:.0f} s", f"{row['val']['tokens_per_step']:.3f}"]
        rows.append([row["method"], row["n"], row["width"], *shown])
    table(["method", "n_predict", "width", "parameters", "training", "tokens per step on val"], rows)
    best, on_eval = found["best"], found["best_on_eval"]
    print(
        f"\nval chooses {best['method']} with {best['n']} heads: tokens per step on eval "
        f"{with_interval(on_eval['offline'])}, n-gram {on_eval['ngram']['tokens_per_step']:.2f}"
    )


def with_interval(offline: dict[str, float]) -> str:
    """Tokens per step of the exact walk, with their 95 % interval."""
    rate, low, high = (offline[f"tokens_per_step{name}"] for name in ("", "_low", "_high"))
    return f"{rate:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()

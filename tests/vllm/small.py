"""Pipelines in small: sum_rnn of the real base, trained for a minute, and eagle3 of a tiny one; what they are asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spec.serving.server import Server
from spec.store.manifest import Manifest
from spec.store.reader import FeatureReader
from tests.stages.workspace import prepare, run_through
from tests.tiny import make_base, write_prompts

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = os.environ.get("XDG_CACHE_HOME")  # before tests/conftest.py sets its own: the base is downloaded once
PROMPTS = 20
NEW_TOKENS = 48
OVERRIDES = (
    "model.dtype=float32",
    "data.max_samples=48",
    f"respond.max_new_tokens={NEW_TOKENS}",
    "trainer.logger=console",
    "trainer.total_epochs=12",
    "optim.loss=ce",
    "features.store=store",
)
TINY = {
    "model": {"dtype": "float32", "speculator": {"method": "eagle3", "n_predict": 3, "draft_vocab_size": 200}},
    "data": {"max_length": 256, "train_batch_size": 8, "micro_batch_size_per_gpu": 8},
    "respond": {"max_new_tokens": NEW_TOKENS, "batch_size": 64},
    "trainer": {"logger": "console", "total_epochs": 8},
}
SERVER = ("--enforce-eager", "--max-num-batched-tokens", "64", "--max-num-seqs", "8")  # most prompts come in parts
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Trained:
    """The folder in which the stages have run, and its eval split."""

    root: Path
    reader: FeatureReader

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of the first prompts of the eval split."""
        lengths = self.reader.manifest.prompt_length
        return [sequence.ids[: lengths[index]].tolist() for index, sequence in self.reader.sequences(range(PROMPTS))]

    @property
    def checkpoint(self) -> Path:
        """The speculator."""
        return self.root / "models/speculator"


def train_small(root: Path) -> Trained:
    """Run the stages in an empty folder; a minute or two on two free cores."""
    shutil.copy(REPOSITORY / "params.yaml", root)
    for stage in ("fetch", "tokenize", "respond", "cache", "train"):
        run(root, stage, *OVERRIDES)
    return Trained(root, FeatureReader(Manifest.load(root / "data/features/eval.json"), root / "store"))


def train_tiny(root: Path) -> Trained:
    """The same with an attention head, on a base with biases whose answers half repeat themselves."""
    prepare(root, TINY)
    make_base(root / "base", "qwen2", hidden_size=64, layers=4, spread=0.12, ending=1.0)
    write_prompts(root / "prompts", train=96, eval=PROMPTS + 4)
    (root / "models").mkdir()
    (root / "models/base").symlink_to(root / "base")
    run_through(root, "train")
    return Trained(root, FeatureReader(Manifest.load(root / "data/features/eval.json"), root / "store"))


def run(root: Path, command: str, *overrides: str, options: Sequence[str] = ()) -> str:
    """Run `spec` as the command line does, in the folder; what it said."""
    environment = dict(os.environ)
    environment.pop("XDG_CACHE_HOME")
    if CACHE is not None:
        environment["XDG_CACHE_HOME"] = CACHE
    changed = [part for override in overrides for part in ("-S", override)]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("spec")), command, *changed, *options],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    return done.stdout


def serving(arguments: list[str], root: Path, name: str) -> Server:
    """A server whose output goes to a file of this name."""
    return Server([*arguments, *SERVER], root / f"{name}.log")

"""Heads that read whole sequences, which nothing outside their files knows: one of another package, and eagle3."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from spec import files, heads
from stages import common
from tests.stages.workspace import prepare
from tests.tiny import make_base
from tests.workspace import REPOSITORY, STAGES

TOY = {"method": "toy", "n_predict": 3, "decay": 0.25}
EAGLE = {"method": "eagle3", "n_predict": 3, "init": "base", "draft_vocab_size": 200}
TWO = "torchrun --standalone --nproc-per-node=2"
CHANGED = {
    "trainer": {"launcher": TWO, "save_freq": 2, "test_freq": 4, "logger": "console"},
    "optim": {"lr": 0.01, "loss": "kl"},
    "respond": {"max_new_tokens": 24, "batch_size": 8},
}


class Project:
    """A folder in which stages run in processes of their own, which find the other package by its entry point."""

    def __init__(self, root: Path, speculator: dict[str, object]) -> None:
        self.root = root
        package = root / "package"
        info = package / "toy_head-1.0.dist-info"
        info.mkdir(parents=True)
        shutil.copy(REPOSITORY / "tests/toy/toy_head.py", package)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-head\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[spec.heads]\ntoy = toy_head:ToyHead\n")
        paths = [str(package), common.child_environment()["PYTHONPATH"]]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        with pytest.MonkeyPatch.context() as patch:  # its parameters are checked here, too
            patch.syspath_prepend(package)
            prepare(root, {**CHANGED, "model": {"dtype": "float32", "speculator": speculator}})
        make_base(root / "base", family="qwen2")

    def start(self, stage: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "stages.cli", stage, *arguments]
        return subprocess.Popen(command, cwd=self.root, env=self.environment, stdout=-1, stderr=-2, text=True)

    def run(self, stage: str, *arguments: str, fails: bool = False) -> str:
        process = self.start(stage, *arguments)
        said, _ = process.communicate(timeout=300)
        assert (process.returncode != 0) == fails, said
        return said

    def weights(self) -> dict[str, torch.Tensor]:
        return torch.load(self.root / common.MODEL / "pytorch_model.bin", weights_only=True)


@pytest.fixture(scope="module", params=[TOY, EAGLE], ids=["toy", "eagle3"])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = Project(tmp_path_factory.mktemp(request.param["method"]), request.param)
    for stage in STAGES:
        made.run(stage)
    return made


def test_the_walk_is_what_decoding_does_and_decoding_is_lossless(project: Project) -> None:
    figures = files.read_json(project.root / "results/evaluate/details.json")
    assert figures["decode"]["lossless"] is True
    for source in figures["decode"]["sources"].values():
        assert source["walk_tokens_per_step"] == source["decode_tokens_per_step"]
    assert figures["offline"]["tokens_per_step"] > 1
    curve = files.read_json(project.root / "results/train/details.json")
    assert curve["val"]["tokens_per_step"] >= 1


def test_tensors_of_the_base_are_not_saved(project: Project) -> None:
    saved = project.weights()
    assert not {"embedding.weight", "embed_tokens.weight"} & saved.keys()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(project.root / "package")
        with pytest.raises(heads.CheckpointError, match="reads the base's embedding"):
            heads.load(project.root / common.MODEL)


def test_a_killed_run_goes_on_to_the_same_weights(project: Project) -> None:
    expected = project.weights()
    shutil.rmtree(project.root / "checkpoints")
    process = project.start("train")
    deadline = time.monotonic() + 120
    while not list((project.root / "checkpoints").glob("*/global_step_2/training.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    for each in (*psutil.Process(process.pid).children(recursive=True), process):
        each.kill()
    process.communicate()
    said = project.run("train")
    assert "resuming at step" in said
    kept = torch.load(next((project.root / "checkpoints").glob("*/global_step_2/pytorch_model.bin")), weights_only=True)
    assert kept.keys() == expected.keys()
    found = project.weights()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_changing_the_method_computes_only_the_taps_that_are_missing(project: Project) -> None:
    nothing = re.compile(r"cache: 0 of \d+ sequences")
    manifest = (project.root / "data/features/train.json").read_bytes()
    assert nothing.match(project.run("cache", "-S", "model.speculator={method: sum_rnn, n_predict: 2}"))
    assert nothing.match(project.run("cache"))
    for folder in (project.root / "store").glob("states-*"):
        if files.read_json(folder / "identity.json")["layer"] != "last":
            shutil.rmtree(folder)
    kept = {path: path.stat().st_mtime_ns for path in (project.root / "store").rglob("record.json")}
    assert not nothing.match(project.run("cache"))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (project.root / "data/features/train.json").read_bytes() == manifest


def test_its_cost_is_counted_and_exports_refuse_it(project: Project) -> None:
    assert "plan: train: about" in project.run("plan")
    said = project.run("export", "--format", "arctic", "--out", "exported", fails=True)
    assert "format arctic holds sum_rnn and sum_lstm" in said
    assert not (project.root / "exported").exists()


def test_joint_training_is_refused_before_any_work(project: Project) -> None:
    said = project.run("cache", "-S", "model.freeze_base_model=false", fails=True)
    assert "reads whole sequences of a frozen base" in said

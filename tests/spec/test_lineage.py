"""What a run is traced back to."""

import hashlib
import subprocess
from pathlib import Path

import pytest
import torch

from spec import lineage
from tests.tiny import with_instructions

BASE = {"name": "models/base", "revision": None, "weights": "w" * 64, "tokenizer": "t" * 64}
FILES = {"train": {"a.parquet": "1" * 64, "b.parquet": "2" * 64}, "val": {"b.parquet": "2" * 64}}
SOURCES = {"base": BASE, "files": {**FILES, "eval": {"c.parquet": "3" * 64}}}


def test_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (lineage.git_state(), caplog.text) == (("none", False), "")
    lineage.PIPELINE.write_text("stages: {}")
    assert lineage.git_state() == ("none", False)
    assert "not a git repository (or any of the parent directories): .git. Without a commit" in caplog.text

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "--quiet")
    assert lineage.git_state() == ("none", False)
    assert "bad revision 'HEAD'. Without a commit" in caplog.text
    Path("file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "--message", "one")
    git("tag", "v1-of-something")
    commit = git("rev-parse", "HEAD")
    assert lineage.git_state() == (commit, False)
    Path("file").write_text("two")
    assert lineage.git_state() == (commit, True)
    monkeypatch.setenv("PATH", "")
    assert lineage.git_state() == ("none", False)
    assert "git: it could not be started (No such file or directory)" in caplog.text


def test_everything_that_a_run_follows_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    found = lineage.tags(SOURCES, torch.device("cpu"))
    assert "dvc.experiment" not in found
    known = {"base.name": "models/base", "base.weights": "w" * 64, "base.tokenizer": "t" * 64}
    known |= {"dvc.lock": "none", "git.commit": "none", "git.dirty": "false", "hardware.device": "cpu"}
    assert found.items() >= known.items()
    assert "base.revision" not in found
    assert int(found["hardware.cores"]) >= 1
    assert found["hardware.cpu"]
    assert float(found["hardware.memory"].removesuffix(" GB")) > 0
    assert found["version.torch"] == torch.__version__
    assert found["version.python"].startswith("3.")
    Path("dvc.lock").write_text("schema: '2.0'\n")
    monkeypatch.setenv("DVC_EXP_NAME", "brisk-heads")
    for instruction, told in (("avx512_bf16", "true"), ("avx2", "false")):
        with_instructions(monkeypatch, instruction)
        found = lineage.tags(SOURCES, torch.device("cpu"))
        assert found["hardware.bfloat16"] == told
    assert found["dvc.lock"] == hashlib.sha256(b"schema: '2.0'\n").hexdigest()
    assert found["dvc.experiment"] == "brisk-heads"


def test_a_file_of_two_splits_comes_once() -> None:
    found = lineage.data_files(SOURCES, ("train", "val"))
    assert found == [
        {"path": "a.parquet", "digest": "1" * 64, "use": "train"},
        {"path": "b.parquet", "digest": "2" * 64, "use": "train, val"},
    ]
    assert lineage.data_files({"base": {}}, ("train",)) == []

"""MLflow: what is recorded, where, and what happens where there is none."""

from __future__ import annotations

import logging
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spec import config as config_module
from spec import files, tracking
from spec.config import Config, flatten
from spec.errors import SpecError
from spec.tracking import Run, git_commit, keep_run, kept_run, project_root, tracking_uri


def make_config(uri: str | None, **trainer: Any) -> Config:
    return config_module.from_mapping({"trainer": {"tracking_uri": uri, "experiment_name": "tests", **trainer}})


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database for all tests here: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "project" / ".dvc").mkdir(parents=True)
    return tmp_path / "project"


@pytest.mark.parametrize("inside", [".", "stages", "a/b/c", ".dvc/tmp/exps/tmp1234", ".dvc/tmp/exps/tmp1234/sub"])
def test_a_projects_folders_belong_to_it(project: Path, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = project / inside
    folder.mkdir(parents=True, exist_ok=True)
    if ".dvc" in inside:
        (folder / ".dvc").mkdir()  # dvc copies the project, .dvc included
    assert project_root(folder) == project
    monkeypatch.chdir(folder)
    assert project_root() == project


def test_outside_of_every_project_the_folder_stands_for_itself(tmp_path: Path) -> None:
    assert project_root(tmp_path) == tmp_path


def test_where_runs_are_tracked(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    assert tracking_uri(make_config(None)) == f"sqlite:///{project / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri(make_config(None)) == "http://host:5000"
    assert tracking_uri(make_config("http://other:5000")) == "http://other:5000"


def test_a_run_and_its_child(database: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    config = make_config(database, launcher="python")
    run = Run(config, "train", {"features": "f" * 64, "method": "sum_rnn"})
    assert run.id is not None
    run.log({"speculator_loss": 3.0, "lr": 0.1}, step=10)
    run.log({"speculator_loss": 2.0}, step=20)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "loss.png").write_bytes(b"png")
    run.artifacts(tmp_path / "results", "train")
    child = Run(config, "evaluate", {}, parent=run.id)
    child.log({"offline.tokens_per_step": 1.9, "other": 1.0})
    child.log({"offline.tokens_per_step": 1.9}, to_parent=True)
    child.finish("FAILED")
    run.finish()

    client = MlflowClient(database)
    found = client.get_run(run.id)
    assert found.info.run_name == "train"
    assert found.info.status == "FINISHED"
    assert found.data.params == {key: str(value) for key, value in flatten(config).items()}
    assert found.data.tags["features"] == "f" * 64
    assert found.data.tags["mlflow.source.git.commit"] == git_commit()
    assert found.data.metrics == {"speculator_loss": 2.0, "lr": 0.1, "offline.tokens_per_step": 1.9}
    history = [(metric.step, metric.value) for metric in client.get_metric_history(run.id, "speculator_loss")]
    assert history == [(10, 3.0), (20, 2.0)]
    assert [item.path for item in client.list_artifacts(run.id, "train")] == ["train/loss.png"]
    assert Path(found.info.artifact_uri.removeprefix("file://")).is_relative_to(
        Path(database.removeprefix("sqlite:///")).parent
    )
    assert child.id is not None
    inner = client.get_run(child.id)
    assert inner.data.tags["mlflow.parentRunId"] == run.id
    assert inner.data.metrics == {"offline.tokens_per_step": 1.9, "other": 1.0}
    assert inner.info.status == "FAILED"
    assert inner.info.experiment_id == found.info.experiment_id
    assert client.get_experiment(found.info.experiment_id).name == "tests"


def test_console_alone_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config(None, logger="console")
    run = Run(config, "train", {})
    run.log({"a": 1.0})
    run.artifacts(tmp_path, "x")
    run.finish()
    keep_run(tmp_path, run, tracking_uri(config))
    assert run.id is None
    assert kept_run(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_answer_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    began = time.monotonic()
    with pytest.raises(SpecError, match=r"MLflow at http://127\.0\.0\.1:9 does not answer.*trainer\.logger=console"):
        Run(make_config("http://127.0.0.1:9"), "train", {})
    assert time.monotonic() - began < 20  # not mlflow's own seven retries, which take minutes


def test_a_database_named_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made: list[str] = []
    run = Run(make_config(None, logger="console"), "train", {})
    run._client = SimpleNamespace(
        get_experiment_by_name=lambda name: None,
        create_experiment=lambda name, artifact_location: made.append(artifact_location) or "1",
    )
    run._experiment("sqlite:///mlflow.db", "tests")
    assert made == [(tmp_path / "mlartifacts").as_uri()]


def test_a_server_that_dies_later_costs_the_record_alone(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    run = Run(make_config(database), "train", {})

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("gone")

    for name in ("log_batch", "log_artifacts", "set_terminated"):
        monkeypatch.setattr(MlflowClient, name, fail)
    with caplog.at_level(logging.WARNING, logger=tracking.__name__):
        run.log({"a": 1.0})
        run.log({"a": 2.0})
        run.artifacts(tmp_path, "x")
        run.finish()
    assert len(caplog.records) == 1
    assert "MLflow stopped answering (gone)" in caplog.text


def test_the_run_that_made_a_checkpoint_is_kept_beside_it(database: str, tmp_path: Path) -> None:
    run = Run(make_config(database), "train", {})
    keep_run(tmp_path, run, database)
    assert kept_run(tmp_path) == run.id
    assert files.read_json(tmp_path / tracking.RUN_FILE)["tracking_uri"] == database
    assert kept_run(tmp_path / "elsewhere") is None


def test_the_commit_and_whether_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() == "none"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "--quiet")
    Path("file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "--message", "one")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    assert git_commit() == commit
    Path("file").write_text("two")
    assert git_commit() == f"{commit}-dirty"

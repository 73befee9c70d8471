"""A tracking server that is down, one that dies while training, and `spec track sync`."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from spec import files, tracking
from spec.config import flatten, load
from spec.training import loop
from spec.training.loop import Progress
from stages import cli, common
from tests.mlflow_server import Server
from tests.stages.workspace import copy_of, inline_workers, ok, prepare, refused, run_through


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything up to cache has run."""
    trainer = {"logger": ["console", "mlflow"], "total_epochs": 10, "test_freq": 7, "experiment_name": "killed"}
    root = prepare(tmp_path_factory.mktemp("ready"), {"trainer": trainer})
    run_through(root, "cache")
    return root


@pytest.fixture
def folder(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(copy_of(ready, tmp_path / "work"))
    inline_workers(monkeypatch)
    return tmp_path / "work"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    made.start()
    yield made
    made.kill()


def sync(*overrides: str, status: int = 0) -> str:
    options = [part for override in overrides for part in ("-S", override)]
    result = CliRunner().invoke(cli.main, ["track", "sync", *options])
    assert result.exit_code == status, (result.output, result.exc_info)
    return result.output


def killed_at(step: int, server: Server, patch: pytest.MonkeyPatch) -> None:
    """SIGKILL to the server when the loop tells of that step."""
    run = loop.run

    def with_kill(config: Any, task: Any, me: Any, checkpoints: Any, listen: Any, *others: Any) -> loop.Result:
        def told(progress: Progress) -> None:
            if progress.step >= step:
                server.kill()
            listen(progress)

        return run(config, task, me, checkpoints, told, *others)

    patch.setattr(loop, "run", with_kill)


def rows(split: str) -> list[dict[str, float]]:
    with Path(f"results/train/{split}.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def check_train_run(uri: str, run_id: str) -> None:
    """Everything that the files hold is there, once."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    for split, prefix in (("train", ""), ("val", "val.")):
        kept = rows(split)
        assert len(kept) >= 6
        for name in kept[0].keys() - {"step", "time"}:
            points = sorted((p.step, p.timestamp, p.value) for p in client.get_metric_history(run_id, prefix + name))
            assert points == [(row["step"], round(row["time"] * 1000), row[name]) for row in kept], name
        loss = client.get_metric_history(run_id, f"by_tokens/{prefix}speculator_loss")
        assert sorted(p.step for p in loss) == [row["positions_seen"] for row in kept]
    metrics = files.read_json(Path("results/train/metrics.json"))
    for name, value in metrics["val"].items():
        assert [(p.step, p.value) for p in client.get_metric_history(run_id, f"best.{name}")] == [
            (metrics["best_step"], value)
        ]
    for name in ("loss.png", "accuracy.png", "tokens_per_step.png", "train.csv", "val.csv", "metrics.json"):
        path = client.download_artifacts(run_id, f"train/{name}", ".")
        assert Path(path).read_bytes() == Path("results/train", name).read_bytes()
    (output,) = run.outputs.model_outputs
    assert client.get_logged_model(output.model_id).status.name == "READY"
    sizes = {each.path: each.file_size for each in client.list_logged_model_artifacts(output.model_id)}
    assert sizes == {name: (common.MODEL / name).stat().st_size for name in ("config.json", "pytorch_model.bin")}
    sources = common.read_sources()
    found = {(each.dataset.name, each.tags[0].value): each.dataset.digest for each in run.inputs.dataset_inputs}
    expected = {(path, use): sha[:36] for use in ("train", "val") for path, sha in sources["files"][use].items()}
    assert found == expected
    assert run.data.params == {key: str(value) for key, value in flatten(load()).items()} | {
        "trainer.tracking_uri": uri,
        "trainer.launcher": run.data.params["trainer.launcher"],
    }
    assert run.data.tags["base.weights"] == sources["base"]["weights"]


def test_a_server_that_is_killed_while_training(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    to = f"trainer.tracking_uri={server.uri}"
    with monkeypatch.context() as patch:
        killed_at(30, server, patch)
        said = ok("train", to)
    assert "of 60" in said
    assert said.count("stopped answering") == said.count("`spec track sync`") == 1
    assert (common.MODEL / "pytorch_model.bin").is_file()
    record = tracking.kept_run(common.MODEL)
    assert record is not None
    assert record.status == "FINISHED"

    assert f"MLflow at {server.uri} could not be used" in refused("evaluate", to)
    assert not Path("results/evaluate").exists()
    assert "did not take the whole run" in sync(status=1)

    server.start()
    before = MlflowClient(server.uri).get_run(record.run_id)
    assert before.info.status == "RUNNING"
    assert max(p.step for p in MlflowClient(server.uri).get_metric_history(record.run_id, "lr")) == 20
    said = sync()
    assert f"train run {record.run_id} at {server.uri}: sent " in said
    assert "2 files of the model" in said
    check_train_run(server.uri, record.run_id)
    assert "all was there" in sync()
    check_train_run(server.uri, record.run_id)

    # train does not run again: the evaluation belongs to the run that made the checkpoint
    ok("evaluate", to)
    made = tracking.Record.load(Path("results/evaluate/mlflow_run.json"))
    assert made is not None
    child = MlflowClient(server.uri).get_run(made.run_id)
    assert child.data.tags["mlflow.parentRunId"] == record.run_id
    metrics = files.read_json(Path("results/evaluate/metrics.json"))
    parent = MlflowClient(server.uri).get_run(record.run_id)
    for run in (child, parent):
        assert run.data.metrics["offline.tokens_per_step"] == metrics["offline"]["tokens_per_step"]
    assert {each.path for each in MlflowClient(server.uri).list_artifacts(made.run_id, "evaluate")} >= {
        "evaluate/acceptance.png",
        "evaluate/domains.png",
    }
    assert sync().count("all was there") == 2
    Path("results/train/loss.png").write_bytes(b"another")
    said = sync(status=1)
    assert "results/train/loss.png is missing or not the file that train run" in said
    assert f"evaluate run {made.run_id} at {server.uri}: all was there" in said


def test_nothing_starts_when_the_server_is_down(folder: Path) -> None:
    message = refused("train", "trainer.tracking_uri=http://127.0.0.1:9")
    assert "MLflow at http://127.0.0.1:9 could not be used" in message
    assert "; start it, or run with trainer.logger=console" in message
    assert not common.MODEL.exists()
    assert not list(Path().glob("checkpoints/*"))


def test_a_run_that_failed_is_completed_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise ConnectionError("gone")

        for name in ("get_run", "log_batch"):
            patch.setattr(MlflowClient, name, fail)
        patch.setattr("stages.train._keep", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            CliRunner().invoke(cli.main, ["train"], catch_exceptions=False)
    record = tracking.Record.load(Path("results/train/mlflow_run.json"))
    assert record is not None
    assert "sent " in sync()
    client = MlflowClient(record.tracking_uri)
    assert client.get_run(record.run_id).info.status == "FAILED"
    assert [p.step for p in client.get_metric_history(record.run_id, "lr")] == [10, 20, 30, 40, 50, 60]


def test_sync_where_nothing_was_tracked(folder: Path) -> None:
    assert "no tracked run lies here" in sync(status=1)
    ok("train", "trainer.logger=console", "trainer.total_epochs=1")
    assert "no tracked run lies here" in sync(status=1)

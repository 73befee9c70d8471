"""A tracking server that is killed while training, a training that fails and goes on, and `spec track sync`."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from spec import files
from spec.config import load
from spec.record import RUN_FILE, Record
from spec.tracking import tracking_uri
from spec.training import loop
from spec.training.loop import Progress
from stages import cli, common
from tests.mlflow_server import Server, check_run
from tests.stages.workspace import command, copy_of, inline_workers, ok, prepare, refused, run_through

EVALUATED = Path("results/evaluate")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything up to cache has run."""
    trainer = {"logger": ["console", "mlflow"], "total_epochs": 10, "test_freq": 7, "save_freq": 20}
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


def sync(*options: str, status: int = 0) -> str:
    return command("track", "sync", *options, status=status)


def at_step(step: int, happens: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    run = loop.run

    def with_event(task: Any, checkpoints: Any, listen: Any, *others: Any) -> loop.Result:
        def told(progress: Progress) -> None:
            if progress.step >= step:
                happens()
            listen(progress)

        return run(task, checkpoints, told, *others)

    patch.setattr(loop, "run", with_event)


def kept(folder: Path) -> Record:
    found = Record.load(folder / RUN_FILE)
    assert found is not None
    return found


def test_a_server_that_is_killed_while_training(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    to, client = f"trainer.tracking_uri={server.uri}", MlflowClient(server.uri)
    with monkeypatch.context() as patch:
        at_step(30, server.kill, patch)
        said = ok("train", to)
    assert said.count("stopped answering") == said.count("`spec track sync`") == 1
    live = kept(common.MODEL)
    assert f"MLflow at {server.uri} could not be used" in refused("evaluate", to)
    assert not EVALUATED.exists()
    assert "did not take the whole run" in sync(status=1)

    server.start()
    assert max(point.step for point in client.get_metric_history(live.run_id, "training/lr")) == 20
    assert f"train run {live.run_id} made again as run " in sync()
    made = client.get_run(live.run_id).data.tags["replaced_by"]
    check_run(server.uri, made, live)
    assert client.get_run(made).data.tags["replaces"] == live.run_id
    assert f"train run {live.run_id} is there, complete, at {server.uri}" in sync()

    ok("evaluate", to)  # train does not run again: the evaluation belongs to the run that made the checkpoint
    child = client.get_run(kept(EVALUATED).run_id)
    assert child.data.tags["mlflow.parentRunId"] == made
    figure = files.read_json(EVALUATED / "metrics.json")["head"]
    for run in (child, client.get_run(made)):
        assert run.data.metrics["head"] == figure
        assert len(run.data.metrics) <= 25
        assert len([name for name in run.data.tags if not name.startswith("mlflow.")]) <= 12
    assert f"{'all':12}  {figure:6.2f}" in child.data.tags["mlflow.note.content"]
    shown = {each.path for each in client.list_artifacts(child.info.run_id, "evaluate")}
    assert shown == {f"evaluate/{path.name}" for path in EVALUATED.iterdir() if path.name != RUN_FILE}
    Path("results/train/loss.png").write_bytes(b"another")
    said = sync(status=1)
    assert re.search(r"results/train/loss.png is missing or not the file that train run .* `dvc checkout`", said)
    assert f"evaluate run {child.info.run_id} is there, complete" in said


def test_a_training_that_fails_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are runs of their own, and the second has the points from before the failure, too."""
    uri, other = tracking_uri(load()), f"sqlite:///{folder / 'other.db'}"
    client = MlflowClient(uri)
    with monkeypatch.context() as patch:
        at_step(40, lambda: 1 / 0, patch)
        with pytest.raises(ZeroDivisionError):
            CliRunner().invoke(cli.main, ["train"], catch_exceptions=False)
    assert client.get_run(kept(Path("results/train")).run_id).info.status == "FAILED"
    assert "made again" in sync("-S", f"trainer.tracking_uri={other}")
    (copy,) = MlflowClient(other).search_runs(["1"])
    assert copy.info.status == "FAILED"
    assert len(MlflowClient(other).get_metric_history(copy.info.run_id, "training/lr")) == 3
    assert "resuming at step 20" in ok("train")
    whole = kept(common.MODEL)
    check_run(uri, whole.run_id, whole)
    points = client.get_metric_history(whole.run_id, "training/lr")
    assert sorted(point.step for point in points) == [10, 20, 30, 40, 50, 60]
    sync()  # nothing is left of the failed run that would stop it


def test_sync_where_nothing_was_tracked(folder: Path) -> None:
    assert "no tracked run lies here" in sync(status=1)
    ok("train", "trainer.logger=console", "trainer.total_epochs=1")
    assert files.read_json(common.MODEL / RUN_FILE) == {}
    assert not Path("mlflow.db").exists()
    assert "no tracked run lies here" in sync(status=1)

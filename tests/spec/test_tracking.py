"""MLflow: what is recorded, where, and what happens where there is none."""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spec import config as config_module
from spec import files, tracking
from spec.config import Config, flatten
from spec.errors import SpecError
from spec.tracking import RUN_FILE, Record, Run, kept_run, project_root, sync, tracking_uri

SOURCES = {
    "base": {"name": "models/base", "weights": "w" * 64},
    "files": {"train": {"data/a.parquet": "1" * 64}, "eval": {"data/c.parquet": "3" * 64}},
}
ROWS = [
    {
        "step": step,
        "time": 1_700_000_000.125 + step,
        "speculator_loss": 1.0 / step,
        "lr": 0.1,
        "positions_seen": 7 * step,
    }
    for step in (10, 20, 25)
]


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


def begin(config: Config, name: str = "train", parent: Record | None = None) -> Run:
    split = "train" if name == "train" else "eval"
    return Run(config, name, {"features": "f" * 64}, SOURCES, (split,), torch.device("cpu"), parent)


def write_results(rows: Sequence[Mapping[str, float]] = ROWS) -> None:
    """A checkpoint, a curve and a picture, as train leaves them."""
    for folder in ("model", "results"):
        Path(folder).mkdir()
    Path("model/config.json").write_text('{"method": "sum_rnn", "n_predict": 3}')
    Path("model/pytorch_model.bin").write_bytes(b"weights")
    Path("results/loss.png").write_bytes(b"png")
    with Path("results/train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def end(run: Run) -> None:
    """As train ends its run."""
    run.finish(
        Path("model"),
        metrics={"best.tokens_per_step": 1.5},
        step=20,
        curves={Path("results/train.csv"): ""},
        artifacts={Path("results/loss.png"): "train"},
        model=[Path("model/config.json"), Path("model/pytorch_model.bin")],
    )


def ended_run(database: str) -> Run:
    """A run with its results, from its beginning to its end."""
    write_results()
    run = begin(make_config(database))
    end(run)
    return run


def curve(uri: str, run_id: str, name: str) -> list[tuple[int, int, float]]:
    from mlflow import MlflowClient

    history = MlflowClient(uri).get_metric_history(run_id, name)
    return sorted((point.step, point.timestamp, point.value) for point in history)


def check_whole(uri: str, run_id: str, config: Config) -> None:
    """Everything of a run that write_results, ROWS and end make is there, and once."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_run(run_id)
    assert found.info.run_name == "train"
    assert found.info.status == "FINISHED"
    assert found.data.params == {key: str(value) for key, value in flatten(config).items()}
    assert found.data.tags["features"] == "f" * 64
    assert found.data.tags["mlflow.source.git.commit"] == found.data.tags["git.commit"]
    assert found.data.tags["base.weights"] == "w" * 64
    times = [round(row["time"] * 1000) for row in ROWS]
    losses = [1.0 / row["step"] for row in ROWS]
    assert curve(uri, run_id, "speculator_loss") == list(zip((10, 20, 25), times, losses, strict=True))
    assert curve(uri, run_id, "by_tokens/speculator_loss") == list(zip((70, 140, 175), times, losses, strict=True))
    assert len(curve(uri, run_id, "lr")) == 3
    assert not any(name.startswith(("by_tokens/lr", "time", "step")) for name in found.data.metrics)
    assert [point[::2] for point in curve(uri, run_id, "best.tokens_per_step")] == [(20, 1.5)]
    assert [item.path for item in client.list_artifacts(run_id, "train")] == ["train/loss.png"]
    (data,) = found.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("data/a.parquet", "1" * 36)
    assert "1" * 64 in data.dataset.source
    assert [tag.value for tag in data.tags] == ["train"]
    (output,) = found.outputs.model_outputs
    assert output.step == 20
    model = client.get_logged_model(output.model_id)
    assert (model.status.name, model.source_run_id) == ("READY", run_id)
    assert model.params == {"method": "sum_rnn", "n_predict": "3"}
    own = [(metric.key, metric.value) for metric in model.metrics if metric.run_id == run_id]
    assert own == [("best.tokens_per_step", 1.5)]
    assert {item.path for item in client.list_logged_model_artifacts(output.model_id)} == {
        "config.json",
        "pytorch_model.bin",
    }


def test_a_run_and_its_child(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    config = make_config(database, launcher="python")
    write_results()
    Path("dvc.lock").write_text("stages: {}")
    run = begin(config)
    assert run.id is not None
    for row in ROWS[:2]:
        run.log(row)
    assert len(curve(database, run.id, "speculator_loss")) == 2
    end(run)
    check_whole(database, run.id, config)
    child = begin(config, "evaluate", kept_run(Path("model")))
    values = {"offline.tokens_per_step": 1.9, "other": 1.0}
    child.finish(tmp_path, "FAILED", values, headline=["offline.tokens_per_step", "decode.speedup"])

    client = MlflowClient(database)
    found = client.get_run(run.id)
    assert found.data.metrics["offline.tokens_per_step"] == 1.9
    assert "other" not in found.data.metrics
    assert Path(client.download_artifacts(run.id, "lineage/dvc.lock", str(tmp_path))).read_text() == "stages: {}"
    assert Path(found.info.artifact_uri.removeprefix("file://")).is_relative_to(
        Path(database.removeprefix("sqlite:///")).parent
    )
    assert child.id is not None
    inner = client.get_run(child.id)
    assert inner.data.tags["mlflow.parentRunId"] == inner.data.tags["trained_by"] == run.id
    assert inner.data.metrics == values
    assert inner.info.status == "FAILED"
    assert [data.dataset.name for data in inner.inputs.dataset_inputs] == ["data/c.parquet"]
    assert [each.model_id for each in inner.inputs.model_inputs] == [found.outputs.model_outputs[0].model_id]
    assert inner.info.experiment_id == found.info.experiment_id
    assert client.get_experiment(found.info.experiment_id).name == "tests"


def test_console_alone_makes_nothing_but_an_empty_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = begin(make_config(None, logger="console"))
    run.log(ROWS[0])
    run.finish(tmp_path)
    assert run.id is None
    assert kept_run(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == [RUN_FILE]  # dvc wants its outputs to be there


def test_a_server_that_does_not_answer_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "")  # so that what the run sets is undone, too
        monkeypatch.delenv(name)
    began = time.monotonic()
    with pytest.raises(SpecError, match=r"MLflow at http://127\.0\.0\.1:9 could not be used .*; start it, or run with"):
        begin(make_config("http://127.0.0.1:9"))
    assert time.monotonic() - began < 20  # not mlflow's own seven retries, which take minutes


def test_a_server_that_refuses_is_not_said_to_be_down(database: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(database)
    client.delete_experiment(client.create_experiment("deleted"))
    with pytest.raises(SpecError, match=r"could not be used \(.*deleted.*\); run with trainer\.logger=console"):
        begin(make_config(database, experiment_name="deleted"))


PASSWORD = "p@ss:word"


def test_a_password_in_the_address_is_used_and_told_nowhere(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    address, asked = f"http://me:{PASSWORD}@host:5000", []

    def client(tracking_uri: str) -> MlflowClient:
        asked.append(tracking_uri)
        return MlflowClient(database)

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.MlflowClient", client)
        run = begin(make_config(address))
        patch.setattr(run._server.client, "log_batch", lambda *_, **__: (_ for _ in ()).throw(OSError(f"at {address}")))
        run.log(ROWS[0])
    assert asked == [address]
    assert run.record is not None
    assert run.record.tracking_uri == run.record.params["trainer.tracking_uri"] == "http://host:5000"
    run.finish(tmp_path)
    assert "at http://host:5000 stopped answering (at http://host:5000)" in caplog.text
    assert PASSWORD not in caplog.text + (tmp_path / RUN_FILE).read_text()
    assert run.id is not None
    assert PASSWORD not in str(MlflowClient(database).get_run(run.id))

    address = address.replace("host:5000", "127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SpecError, match=r"at http://127\.0\.0\.1:9 could not be used") as error:
        begin(make_config(address))
    assert PASSWORD not in str(error.value)
    with pytest.raises(SpecError, match=r"at http://127\.0\.0\.1:9 did not take the whole run") as error:
        sync(run.record, address)
    assert PASSWORD not in str(error.value)


def test_an_experiment_that_another_run_makes_first() -> None:
    from mlflow.exceptions import MlflowException

    def create(name: str, artifact_location: str | None) -> str:
        raise MlflowException("already exists")

    found = iter((None, SimpleNamespace(experiment_id="7"), None, None))
    server = tracking._Server.__new__(tracking._Server)
    server.uri = "http://host:5000"
    server.client = SimpleNamespace(get_experiment_by_name=lambda name: next(found), create_experiment=create)
    assert server._experiment("tests") == "7"
    with pytest.raises(MlflowException, match="already exists"):
        server._experiment("tests")


def test_an_evaluation_finds_its_training_in_another_experiment(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    run = ended_run(database)
    child = begin(make_config(database, experiment_name="others"), "evaluate", kept_run(Path("model")))
    child.finish(tmp_path, metrics={"a": 2.0}, headline=["a"])
    assert run.id is not None
    assert child.id is not None
    client = MlflowClient(database)
    parent, inner = client.get_run(run.id), client.get_run(child.id)
    assert inner.info.experiment_id != parent.info.experiment_id
    assert inner.data.tags["mlflow.parentRunId"] == run.id
    assert parent.data.metrics["a"] == 2.0
    assert inner.inputs.model_inputs[0].model_id == parent.outputs.model_outputs[0].model_id


def test_a_database_named_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made: list[str] = []
    server = tracking._Server.__new__(tracking._Server)
    server.uri = "sqlite:///mlflow.db"
    server.client = SimpleNamespace(
        get_experiment_by_name=lambda name: None,
        create_experiment=lambda name, artifact_location: made.append(artifact_location) or "1",
    )
    server._experiment("tests")
    assert made == [(tmp_path / "mlartifacts").as_uri()]


def test_a_server_that_dies_costs_nothing_and_sync_makes_up_for_it(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    write_results()
    config = make_config(database)
    run = begin(config)
    run.log(ROWS[0])
    assert run.id is not None
    asked: list[str] = []

    def dead(name: str) -> Any:
        def fail(*_: object, **__: object) -> None:
            asked.append(name)
            raise ConnectionError("gone")

        return fail

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger=tracking.__name__):
        for name in ("get_run", "log_batch", "log_artifact", "set_terminated", "search_runs"):
            patch.setattr(MlflowClient, name, dead(name))
        run.log(ROWS[1])
        run.log(ROWS[2])
        assert asked == ["log_batch"]  # once, and not again at every step
        end(run)
        assert len(asked) == 2  # and once at the end
    assert len(caplog.records) == 1
    assert f"MLflow at {database} stopped answering (gone)" in caplog.text
    assert "`spec track sync`" in caplog.text

    record = kept_run(Path("model"))
    assert record is not None
    sent = sync(record, database)
    assert {name: count for name, count in sent.items() if count} == {
        "points": 2 * 4 + 1,  # loss against steps and tokens, lr, positions; then the best
        "files": 1,
        "files of the model": 2,
        "status": 1,
    }
    check_whole(database, run.id, config)
    assert not +sync(record, database)
    check_whole(database, run.id, config)


def test_a_server_that_comes_back_gets_the_whole_run(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    write_results()
    config = make_config(database)
    run = begin(config)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
        run.log(ROWS[0])
    with caplog.at_level(logging.WARNING, logger=tracking.__name__):
        end(run)
    assert "MLflow answers again" in caplog.text
    assert run.id is not None
    check_whole(database, run.id, config)


def test_a_run_is_made_on_another_server_once(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its child, under other ids."""
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    write_results()
    config = make_config(database)
    run = begin(config)
    end(run)
    record = kept_run(Path("model"))
    assert record is not None
    begin(config, "evaluate", record).finish(Path("results"), metrics={"a": 2.0}, headline=["a"])
    child = Record.load(Path("results") / RUN_FILE)
    assert child is not None
    other = f"sqlite:///{tmp_path / 'other.db'}"
    before = files.read_json(Path("model") / RUN_FILE)
    assert sync(record, other)["run"] == 1
    assert sync(child, other)["run"] == 1
    assert not +sync(record, other)
    assert not +sync(child, other)
    assert files.read_json(Path("model") / RUN_FILE) == before  # dvc tracks it
    client = MlflowClient(other)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    runs = {each.info.run_name: each for each in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"train", "evaluate"}
    assert runs["train"].info.run_id != run.id
    assert runs["train"].info.start_time == record.started
    assert runs["train"].info.end_time == record.ended
    assert runs["train"].data.metrics["a"] == 2.0
    assert runs["evaluate"].data.tags["mlflow.parentRunId"] == runs["train"].info.run_id
    check_whole(other, runs["train"].info.run_id, config)


def test_files_that_are_no_longer_the_runs_are_not_sent(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended_run(database)
    record = kept_run(Path("model"))
    assert record is not None
    Path("results/train.csv").write_text("step,time,speculator_loss\n10,1,9\n")
    with pytest.raises(
        SpecError, match=r"results/train\.csv is missing or not the file that train run .* `dvc checkout`"
    ):
        sync(record, database)


def test_a_file_that_is_no_record_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert kept_run(tmp_path) is None
    files.write_json(tmp_path / RUN_FILE, {"run_id": "1", "tracking_uri": "sqlite:///x"})
    with pytest.raises(SpecError, match="is not a record of this version"):
        Record.load(tmp_path / RUN_FILE)
    assert kept_run(tmp_path) is None  # evaluation does without its parent
    assert "is not a record of this version" in caplog.text

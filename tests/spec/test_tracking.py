"""MLflow: what is recorded, where, and what becomes of a run whose server dies."""

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from spec import config as config_module
from spec import files, tracking
from spec.config import Config, flatten
from spec.errors import SpecError
from spec.record import RUN_FILE, Record, kept
from spec.tracking import Run, sync, tracking_uri
from tests.mlflow_server import check_run

MODEL, RESULTS = Path("model"), Path("results")
SHOWN = {"speculator_loss": "curves/loss", "lr": "training/lr", "base_loss": "curves/base_loss"}
ROWS = [
    {"step": step, "time": 1_700_000_000.125 + step, "speculator_loss": 1 / step, "lr": 0.1, "positions_seen": 7 * step}
    for step in (10, 20, 25)
]


def make_config(uri: str | None, **trainer: Any) -> Config:
    return config_module.from_mapping({"trainer": {"tracking_uri": uri, "experiment_name": "tests", **trainer}})


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database for all tests here: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, a curve and a picture, as train leaves them."""
    monkeypatch.chdir(tmp_path)
    MODEL.mkdir()
    RESULTS.mkdir()
    Path("dvc.lock").write_text("stages: {}")
    (MODEL / "config.json").write_text('{"method": "sum_rnn", "n_predict": 3}')
    (MODEL / "pytorch_model.bin").write_bytes(b"weights")
    (RESULTS / "loss.png").write_bytes(b"png")
    lines = [list(ROWS[0]), *(row.values() for row in ROWS)]
    (RESULTS / "train.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    return tmp_path


def begin(config: Config, name: str = "train", parent: Record | None = None) -> Run:
    tags = {"features": "ff", "git.commit": "abc", "git.dirty": "false"}
    sources = {"base": {}, "files": {name: {f"data/{name} (1).parquet": "1" * 64}}}
    return Run(config, name, tags, sources, (name,), torch.device("cpu"), parent)


def train(config: Config) -> Record:
    """A training run from its beginning to its end."""
    run = begin(config)
    for row in ROWS:
        run.log(row, SHOWN)
    made = {"curves": {"results/train.csv": SHOWN}, "artifacts": {"results/loss.png": "train"}}
    run.finish(MODEL, metrics={"val": 1.5}, step=20, model=["model/config.json", "model/pytorch_model.bin"], **made)
    return run.record


def evaluate(config: Config, status: str = "FINISHED") -> Record:
    """An evaluation of that training's checkpoint."""
    run = begin(config, "evaluate", kept(MODEL))
    run.finish(RESULTS, status, metrics={"a": 2.0, "b": 1.0}, headline=["a", "c"])
    return run.record


def made_anew(record: Record, uri: str) -> str:
    """The id of the run that sync makes, and makes only once."""
    made = sync(record, uri)
    assert made is not None
    assert sync(record, uri) is None
    return made


def check_child(uri: str, run_id: str, parent: str) -> None:
    client = MlflowClient(uri)
    inner, outer = client.get_run(run_id), client.get_run(parent)
    assert inner.data.tags["mlflow.parentRunId"] == parent
    assert inner.data.metrics == {"a": 2.0, "b": 1.0}
    assert outer.data.metrics.keys() & {"a", "b"} == {"a"}
    models = [each.model_id for each in inner.inputs.model_inputs]
    assert models == [each.model_id for each in outer.outputs.model_outputs]


@pytest.mark.parametrize(
    ("inside", "root"),
    [("a", ""), (".dvc/tmp/exps/tmp1234", ""), (".dvc/tmp/exps/tmp1234/a", ""), ("other/.dvc/..", "other")],
)
def test_where_runs_are_tracked(tmp_path: Path, inside: str, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary experiments belong to their project, although dvc copies it there, .dvc included."""
    for folder in (".dvc", inside, ".dvc/tmp/exps/tmp1234/.dvc"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / inside)
    assert tracking_uri(make_config(None)) == f"sqlite:///{tmp_path / root / 'mlflow.db'}"
    assert tracking_uri(make_config(None), "http://before:5000") == "http://before:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri(make_config(None), "http://before:5000") == "http://host:5000"
    assert tracking_uri(make_config("http://other:5000")) == "http://other:5000"


def test_a_run_and_its_child_in_another_experiment(database: str, folder: Path) -> None:
    config, client = make_config(database, launcher="x" * 7000), MlflowClient(database)
    record = train(config)
    check_run(database, record.run_id, record)
    run = client.get_run(record.run_id)
    assert run.data.params == {key: str(value)[:6000] for key, value in flatten(config).items()}
    assert run.data.tags["mlflow.source.git.commit"] == "abc"
    assert Path(client.download_artifacts(record.run_id, "lineage/dvc.lock")).read_text() == "stages: {}"
    model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert model.params == {"method": "sum_rnn", "n_predict": "3"}
    assert model.tags["sha256.pytorch_model.bin"] == files.digest_file(MODEL / "pytorch_model.bin")
    assert [metric.key for metric in model.metrics] == ["val"]
    child = evaluate(make_config(database, experiment_name="others"), "FAILED")
    check_child(database, child.run_id, record.run_id)
    inner = client.get_run(child.run_id)
    assert (inner.info.status, inner.data.tags["trained_by"]) == ("FAILED", record.run_id)
    assert inner.info.experiment_id == client.get_experiment_by_name("others").experiment_id
    assert sync(record, database) is sync(child, database) is None  # both are there


def test_a_server_that_does_not_answer_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracking._PATIENCE:
        monkeypatch.setenv(name, "")  # so that what the run sets is undone, too
        monkeypatch.delenv(name)
    began = time.monotonic()
    words = r"could not be used .*; start the server, or run with trainer\.logger=console"
    with pytest.raises(SpecError, match=rf"MLflow at http://127\.0\.0\.1:9 {words}"):
        begin(make_config("http://127.0.0.1:9"))
    assert time.monotonic() - began < 20  # not mlflow's own seven retries, which take minutes


def test_an_experiment_that_was_deleted(database: str, folder: Path) -> None:
    """Before a run and after it: what to type is said, and then nothing is lost."""
    client, config = MlflowClient(database), make_config(database, experiment_name="deleted")
    record = train(config)
    experiment = client.get_experiment_by_name("deleted").experiment_id
    client.delete_experiment(experiment)
    words = rf"'deleted' was deleted: .* experiments restore --experiment-id {experiment}`.* trainer\.experiment_name"
    with pytest.raises(SpecError, match=rf"could not be used \(.*{words}\); check .*, or run with trainer\.logger"):
        begin(config)
    with pytest.raises(SpecError, match=words):
        sync(record, database)
    client.restore_experiment(experiment)
    assert sync(record, database) is None


def test_a_server_that_refuses_everything_is_told_once(
    database: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("run is gone", INVALID_PARAMETER_VALUE)

    run = begin(make_config(database))
    monkeypatch.setattr(MlflowClient, "log_batch", refuse)
    run.finish(RESULTS, metrics={"a": 1.0})
    (said,) = caplog.messages
    assert "refuses the rest of the run (run is gone); the stage goes on" in said


def test_an_experiment_that_another_run_makes_first(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(database)
    made = client.create_experiment("race")
    seen = iter([None])
    look = MlflowClient.get_experiment_by_name
    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", lambda self, name: next(seen, look(self, name)))
    assert tracking._experiment(client, database, "race") == made


def test_a_password_in_the_address_is_used_and_told_nowhere(
    database: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    address = "http://me:p@ss:word@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SpecError, match=r"MLflow at http://127\.0\.0\.1:9 ") as refused:
        begin(make_config(address))
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "_connect", lambda uri: {address: MlflowClient(database)}[uri])
        run = begin(make_config(address))
        patch.setattr(MlflowClient, "log_batch", lambda *_, **__: (_ for _ in ()).throw(OSError(f"at {address}")))
        run.log(ROWS[0], SHOWN)
    assert run.record.tracking_uri == run.record.params["trainer.tracking_uri"] == "http://127.0.0.1:9"
    run.finish(RESULTS)
    assert "at http://127.0.0.1:9 stopped answering (at http://127.0.0.1:9)" in caplog.text
    with pytest.raises(SpecError, match=r"MLflow at http://127\.0\.0\.1:9 ") as unsent:
        sync(run.record, address)
    shown = str(MlflowClient(database).get_run(run.record.run_id))
    assert "p@ss" not in f"{refused.value}{unsent.value}{shown}{caplog.text}{(RESULTS / RUN_FILE).read_text()}"


def test_a_server_that_dies_costs_a_warning_and_sync_makes_the_run_anew(
    database: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, client, asked = make_config(database), MlflowClient(database), []

    def dead(*_: object, **__: object) -> None:
        asked.append("again")
        raise ConnectionError("gone")

    log_batch = MlflowClient.log_batch
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(MlflowClient, "log_batch", lambda *a, metrics=(), **o: (dead if metrics else log_batch)(*a, **o))
        partial = train(config)
    assert len(asked) == 1  # neither at every step nor at the end
    (warning,) = caplog.messages
    assert f"MLflow at {database} stopped answering (gone)" in warning
    assert "`spec track sync`" in warning
    alone = evaluate(config)  # the server answers again, and has no complete run of the training
    assert "mlflow.parentRunId" not in client.get_run(alone.run_id).data.tags
    before = (MODEL / RUN_FILE).read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", dead)
        with pytest.raises(SpecError, match="did not take the whole run"):
            sync(partial, database)  # leaves a second part of the run
    made = made_anew(partial, database)
    check_run(database, made, partial)
    parts = client.get_run(made).data.tags["replaces"].split(", ")
    assert len(parts) == len({*parts, partial.run_id}) == 2
    for part in map(client.get_run, parts):
        assert (part.data.tags["replaced_by"], part.info.status) == (made, "KILLED")
    child = made_anew(alone, database)
    check_child(database, child, made)
    assert client.get_run(alone.run_id).data.tags["replaced_by"] == child
    check_child(database, evaluate(config).run_id, made)
    assert (MODEL / RUN_FILE).read_bytes() == before  # dvc tracks it


def test_a_run_is_made_once_on_another_server(database: str, folder: Path) -> None:
    """With its child, under other ids, and from its own files; the database is named from the working directory."""
    config, other = make_config(database), "sqlite:///other.db"
    record = train(config)
    made = made_anew(record, other)
    check_child(other, made_anew(evaluate(config), other), made)
    check_run(other, made, record)
    found = MlflowClient(other).get_run(made)
    assert not found.data.tags.keys() & {"replaces", "replaced_by"}
    assert found.info.artifact_uri.startswith((folder / "mlartifacts").as_uri())
    assert len(MlflowClient(other).search_runs([found.info.experiment_id])) == 2


def test_a_file_that_is_no_record_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert kept(tmp_path) is None
    files.write_json(tmp_path / RUN_FILE, {"run_id": "1", "tracking_uri": "sqlite:///x"})
    with pytest.raises(SpecError, match="is not a record of this version"):
        Record.load(tmp_path / RUN_FILE)
    assert kept(tmp_path) is None  # evaluation does without its parent
    assert "is not a record of this version" in caplog.text

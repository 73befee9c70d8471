"""MLflow, which only this module knows: it shows runs while they go on, and replays them from the files they wrote."""

from __future__ import annotations

import contextlib
import csv
import getpass
import itertools
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spec import files
from spec.config import Config, flatten
from spec.errors import SpecError
from spec.lineage import LOCK, DataFile
from spec.record import RUN_FILE, Outcome, Record

log = logging.getLogger(__name__)

PARENT, REPLACES, REPLACED_BY = "mlflow.parentRunId", "replaces", "replaced_by"
"""Tags that link a run to others on its server."""
_VALUE_LIMIT = 6000
_DIGEST_LIMIT = 36
_LEARNED = ("speculator_loss", "loss.", "accuracy.", "tokens_per_step", "acceptance.", "base_")
"""Prefixes of the columns that are also drawn against tokens seen."""
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""A stage must not wait minutes for a server that is gone; MLflow's own defaults are 120 s and 7 retries."""


def project_root() -> Path:
    """The project that the working directory belongs to; temporary experiments of dvc belong to theirs."""
    folder = Path.cwd()
    folders = (folder, *folder.parents)
    queued = (Path(*each.parts[:-3]) for each in folders if each.parts[-3:] == (".dvc", "tmp", "exps"))
    return next(queued, next((each for each in folders if (each / ".dvc").is_dir()), folder))


def tracking_uri(config: Config, default: str | None = None) -> str:
    """trainer.tracking_uri, else MLFLOW_TRACKING_URI, else the default, else mlflow.db in the project's root."""
    named = config.trainer.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default
    return named or f"sqlite:///{project_root() / 'mlflow.db'}"


def without_password(text: str) -> str:
    """A text, such as an error's, whose addresses name neither user nor password."""
    return re.sub(r"(?<=://)[^\s/]*@", "", text)


class Run:
    """An MLflow run that goes on, or nothing where trainer.logger leaves mlflow out.

    Args:
        config: where to track, and what to record as parameters.
        name: of the run.
        tags: those of lineage.tags, and others such as the feature digest.
        data: the data files that the run reads.
        parent: the record of an earlier run: this run becomes its child.

    Raises:
        SpecError: the tracking server does not answer, or refuses the run.
    """

    def __init__(
        self, config: Config, name: str, tags: Mapping[str, str], data: list[DataFile], parent: Record | None = None
    ) -> None:
        self.record: Record | None = None
        self._remote: _Remote | None = None
        if "mlflow" not in config.trainer.logger:
            return
        uri = tracking_uri(config)
        record = Record(
            id=uuid.uuid4().hex,
            run_id="",
            tracking_uri=without_password(uri),
            experiment=config.trainer.experiment_name,
            name=name,
            parent=parent.id if parent else None,
            started=time.time_ns() // 1_000_000,
            params={key: without_password(str(value))[:_VALUE_LIMIT] for key, value in flatten(config).items()},
            tags={**_source(name, tags), **tags, **({"trained_by": parent.run_id} if parent else {})},
            data=data,
            texts={"lineage/dvc.lock": LOCK.read_text()} if LOCK.is_file() else {},
        )
        try:
            self._remote = _Remote(_connect(uri), uri, record)
        except Exception as error:
            raise SpecError(
                f"MLflow at {record.tracking_uri} could not be used ({without_password(str(error))}); start it if it "
                "is not running, or run with trainer.logger=console"
            ) from None
        self.record = replace(record, run_id=self._remote.id)

    def log(self, row: Mapping[str, float], prefix: str = "") -> None:
        """Show a row of a curve at once; a server that has failed before is not asked again.

        Args:
            row: as the curve's file has it: `step`, `time` and figures by name.
            prefix: what the figures' names begin with in MLflow.
        """
        if self._remote is not None:
            with self._surviving():
                self._remote.log(_points(row, prefix))

    def finish(self, folder: Path, outcome: Outcome, status: str = "FINISHED") -> None:
        """Write the run's record into a folder, and end the run on the server."""
        if self.record is None:
            files.write_json(folder / RUN_FILE, {})
            return
        ended, digests = time.time_ns() // 1_000_000, outcome.digests_now()
        self.record = replace(self.record, **vars(outcome), ended=ended, status=status, digests=digests)
        files.write_json(folder / RUN_FILE, asdict(self.record))
        if self._remote is not None:
            with self._surviving():
                self._remote.end(self.record)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """A server that dies costs the view of the run, never the run."""
        try:
            yield
        except Exception as error:
            self._remote = None
            log.warning(
                "MLflow at %s stopped answering (%s); the stage goes on, its files hold everything, and once it has "
                "ended `spec track sync` makes the whole run from them",
                self.record.tracking_uri if self.record else "",
                without_password(str(error)),
            )


def sync(record: Record, uri: str) -> str | None:
    """Replay a run into a new one on a server, unless the server has it complete; safe to repeat.

    A part of the run that an earlier attempt left there is tagged as replaced by the new one. A child that does not
    belong to the complete run of its parent is replaced as well.

    Returns:
        MLflow's id of the new run.

    Raises:
        SpecError: files that are no longer the run's, or a server that does not answer.
    """
    record.check_files()
    try:
        client = _connect(uri)
        complete, parent = _complete(client, record.id), _complete(client, record.parent)
        if complete and (parent is None or complete.data.tags.get(PARENT) == parent.info.run_id):
            return None
        remote = _Remote(client, uri, record, _runs(client, record.id))
        for path, prefix in record.curves.items():
            with Path(path).open(newline="") as file:
                rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
            remote.log(point for row in rows for point in _points(row, prefix))
        remote.end(record)
    except Exception as error:
        message = f"MLflow at {uri} did not take the whole run ({error}); run this again"
        raise SpecError(without_password(message)) from error
    return remote.id


class _Remote:
    """A new run on a server. When it has ended, it is complete, and the runs that it replaces no longer count."""

    def __init__(self, client: Any, uri: str, record: Record, replaced: Iterable[Any] = ()) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        self.client, self.replaced = client, list(replaced)
        parent = _complete(client, record.parent)
        self.parent = str(parent.info.run_id) if parent else None
        tags = {"record": record.id, **record.tags, **({PARENT: self.parent} if self.parent else {})}
        if self.replaced:
            tags[REPLACES] = ", ".join(run.info.run_id for run in self.replaced)
        self.experiment = _experiment(client, uri, record.experiment)
        self.id = str(client.create_run(self.experiment, record.started, tags, record.name).info.run_id)
        for batch in _batches((Param(key, value) for key, value in record.params.items()), 100):
            client.log_batch(self.id, params=batch)
        datasets = []
        for each in record.data:
            source = json.dumps({"uri": each.path, "sha256": each.digest})
            dataset = Dataset(each.path, each.digest[:_DIGEST_LIMIT], "local", source)
            datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", each.use)]))
        client.log_inputs(self.id, datasets)
        for path, text in record.texts.items():
            client.log_text(self.id, text, path)

    def log(self, points: Iterable[Any]) -> None:
        """Log points of curves."""
        for batch in _batches(points, 1000):  # as many as MLflow takes at once
            self.client.log_batch(self.id, metrics=batch)

    def end(self, record: Record) -> None:
        """Log what the run made, and then end it."""
        from mlflow.entities import LoggedModelInput, Metric

        model = self._log_model(record) if record.model else None
        figures = [(name, value, record.ended, record.step) for name, value in record.metrics.items()]
        if self.parent:
            self.client.log_batch(self.parent, [Metric(*each) for each in figures if each[0] in record.headline])
            for output in self.client.get_run(self.parent).outputs.model_outputs:
                model = output.model_id
                self.client.log_inputs(self.id, models=[LoggedModelInput(model)])
        self.log(Metric(*each, model_id=model) for each in figures)
        for path, folder in record.artifacts.items():
            self.client.log_artifact(self.id, path, folder)
        for run in self.replaced:
            self.client.set_tag(run.info.run_id, REPLACED_BY, self.id)
            if run.info.status == "RUNNING":
                self.client.set_terminated(run.info.run_id, "KILLED")
        self.client.set_terminated(self.id, record.status, record.ended)

    def _log_model(self, record: Record) -> str:
        """The checkpoint as a logged model; returns its id."""
        from mlflow.entities import LoggedModelOutput

        (shape,) = (files.read_json(Path(path)) for path in record.model if path.endswith("config.json"))
        params = {key: str(value)[:_VALUE_LIMIT] for key, value in shape.items()}
        digests = {f"sha256.{Path(path).name}": record.digests[path] for path in record.model}
        model = self.client.create_logged_model(self.experiment, "speculator", self.id, digests, params, "speculator")
        for path in record.model:
            self.client.log_model_artifact(model.model_id, path)
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(self.id, [LoggedModelOutput(model.model_id, record.step)])
        return str(model.model_id)


def _connect(uri: str) -> Any:
    from mlflow import MlflowClient  # takes seconds, and only where it is wanted

    for key, value in _PATIENCE.items():
        os.environ.setdefault(key, value)
    return MlflowClient(tracking_uri=uri)


def _experiment(client: Any, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    if client.get_experiment_by_name(name) is None:
        database = Path(uri.removeprefix("sqlite:///")).resolve()
        artifacts = (database.parent / "mlartifacts").as_uri() if uri.startswith("sqlite:///") else None
        try:
            client.create_experiment(name, artifacts)
        except MlflowException:
            if client.get_experiment_by_name(name) is None:  # else another run has made it just now
                raise
    return str(client.get_experiment_by_name(name).experiment_id)


def _runs(client: Any, record: str | None) -> list[Any]:
    """All runs of a record, in whatever experiment: an evaluation may have another one than its training."""
    if record is None:
        return []
    experiments = [each.experiment_id for each in client.search_experiments(max_results=50_000)]  # MLflow's limit
    return list(client.search_runs(experiments, f"tags.record = '{record}'"))


def _complete(client: Any, record: str | None) -> Any:
    """The run of a record that has ended and is not replaced, if there is one."""
    found = (run for run in _runs(client, record) if REPLACED_BY not in run.data.tags)
    return next((run for run in found if run.info.status != "RUNNING"), None)


def _points(row: Mapping[str, float], prefix: str) -> Iterator[Any]:
    """A curve's row as MLflow's points, against steps, and what is learned against tokens seen as well."""
    from mlflow.entities import Metric

    timestamp, step = round(row["time"] * 1000), int(row["step"])
    for name, value in row.items():
        if name in ("step", "time"):
            continue
        yield Metric(prefix + name, value, timestamp, step)
        if name.startswith(_LEARNED) and "positions_seen" in row:
            yield Metric(f"by_tokens/{prefix}{name}", value, timestamp, int(row["positions_seen"]))


def _source(name: str, tags: Mapping[str, str]) -> dict[str, str]:
    """Where a run comes from, in the tags that MLflow's pages show by themselves."""
    found = {f"mlflow.source.git.{key}": tags[f"git.{key}"] for key in ("commit", "dirty")}
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        found["mlflow.user"] = getpass.getuser()
    return found | {"mlflow.source.name": f"spec {name}", "mlflow.source.type": "LOCAL"}


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch

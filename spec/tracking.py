"""MLflow, which only this module calls: it shows runs while they go on, and replays them from the files they wrote."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from spec import files
from spec.config import Config
from spec.errors import SpecError
from spec.record import RUN_FILE, VALUE_LIMIT, Record, begin, without_password

log = logging.getLogger(__name__)

PARENT, REPLACES, REPLACED_BY = "mlflow.parentRunId", "replaces", "replaced_by"
"""Tags that link a run to others on its server."""
_VIEW = "mlflow.sharedViewState.speculators"
"""The tag of an experiment which MLflow lists under "Views": its table of runs with the figures that count."""
_FIGURES = {f"metrics.`{name}`": 80 for name in ("answers", "head", "hybrid", "x_plain")}
_WIDTHS = {"attributes.`Run Name`": 150, "attributes.`Created`": 130, "tags.`method`": 90, **_FIGURES}
"""The view's columns and their widths in pixels: all of them fit next to MLflow's assistant."""
_KEY_LIMIT, _DIGEST_LIMIT, _DATASETS_LIMIT = 250, 36, 1000
"""Characters that MLflow takes, and data files in a call."""
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
"""A stage must not wait minutes for a server that is gone; MLflow's own defaults are 120 s and 7 retries. Nor does it
show what MLflow is doing meanwhile."""


def tracking_uri(config: Config, default: str | None = None) -> str:
    """trainer.tracking_uri, else MLFLOW_TRACKING_URI, else the default, else mlflow.db in the project's root, which is
    that of the project itself in a temporary experiment of dvc."""
    if named := config.trainer.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default:
        return named
    folders = (Path.cwd(), *Path.cwd().parents)
    queued = (each.parents[2] for each in folders if each.parts[-3:] == (".dvc", "tmp", "exps"))
    root = next(queued, next((each for each in folders if (each / ".dvc").is_dir()), folders[0]))
    return f"sqlite:///{root / 'mlflow.db'}"


class Run:
    """An MLflow run that goes on, or nothing where trainer.logger leaves mlflow out.

    Args:
        config: where to track, and what to record as parameters.
        name: of the run.
        tags: those that lineage.tags does not know, such as the feature digest.
        sources: the base and the data files, as data/sources.json names them.
        splits: whose files the run reads.
        device: that it computes on.
        parent: the record of the run that this one becomes a child of.

    Raises:
        SpecError: the tracking server does not answer, or refuses the run.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        tags: Mapping[str, str],
        sources: Mapping[str, Any],
        splits: tuple[str, ...],
        device: torch.device,
        parent: Record | None = None,
    ) -> None:
        self.record: Record | None = None
        self._remote: _Remote | None = None
        if "mlflow" not in config.trainer.logger:
            return
        uri = tracking_uri(config)
        record = begin(config, without_password(uri), name, tags, sources, splits, device, parent)
        try:
            self._remote = _Remote(_connect(uri), uri, record)
        except Exception as error:
            named = "check trainer.tracking_uri and trainer.experiment_name"
            remedy = "start the server" if _answers_no_more(error) else named
            raise SpecError(
                f"MLflow at {record.tracking_uri} could not be used ({without_password(str(error))}); {remedy}, or "
                "run with trainer.logger=console"
            ) from None
        self.record = replace(record, run_id=self._remote.id)

    def log(self, row: Mapping[str, float], names: Mapping[str, str]) -> None:
        """Show a row of a curve at once, as Record.curves has it; a server that has failed is not asked again."""
        if self._remote is not None:
            with self._surviving():
                self._remote.log([row], names)

    def finish(self, folder: Path, status: str = "FINISHED", **made: Any) -> None:
        """Write the run's record, with those fields of it that the run made, into a folder; end it on the server."""
        if self.record is None:
            files.write_json(folder / RUN_FILE, {})
            return
        record = replace(self.record, **made, ended=time.time_ns() // 1_000_000, status=status)
        self.record = replace(record, digests=record.digests_now())
        files.write_json(folder / RUN_FILE, asdict(self.record))
        if self._remote is not None:
            with self._surviving():
                self._remote.end(self.record)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """A server that dies or refuses the run costs the view of it alone."""
        try:
            yield
        except Exception as error:
            self._remote = None
            log.warning(
                "MLflow at %s %s (%s); the stage goes on, and its files hold everything: when it has ended, "
                "`spec track sync` makes the whole run from them",
                self.record.tracking_uri if self.record else "",
                "stopped answering" if _answers_no_more(error) else "refuses the rest of the run",
                without_password(str(error)),
            )


def sync(record: Record, uri: str) -> str | None:
    """Replay a run into a new one on a server, unless the server has it complete; safe to repeat.

    A part of the run that an earlier attempt left there is tagged as replaced by the new one. A child that does not
    belong to the complete run of its parent is replaced as well. Returns MLflow's id of the new run.

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
        for path, names in record.curves.items():
            with Path(path).open(newline="") as file:
                rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
            remote.log(rows, names)
        remote.end(record)
    except Exception as error:
        remedy = "start the server and run this again" if _answers_no_more(error) else "run this again"
        message = f"MLflow at {uri} did not take the whole run ({error}); {remedy}"
        raise SpecError(without_password(message)) from error
    return remote.id


class _Remote:
    """A new run on a server. When it has ended, it is complete, and the runs that it replaces no longer count."""

    def __init__(self, client: Any, uri: str, record: Record, replaced: Sequence[Any] = ()) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        self.client, self.replaced = client, replaced
        parent = _complete(client, record.parent)
        self.parent = str(parent.info.run_id) if parent else None
        tags = {"record": record.id, **({PARENT: self.parent} if self.parent else {})}
        if self.replaced:
            tags[REPLACES] = ", ".join(run.info.run_id for run in self.replaced)
        self.experiment = _experiment(client, uri, record.experiment)
        self.id = str(client.create_run(self.experiment, record.started, tags, record.name).info.run_id)
        params = [Param(name, value) for name, value in record.params.items()]
        client.log_batch(self.id, params=params, tags=[RunTag(name, value) for name, value in record.tags.items()])
        datasets = [
            DatasetInput(
                Dataset(
                    each["path"][-_KEY_LIMIT:],
                    each["digest"][:_DIGEST_LIMIT],
                    "local",
                    json.dumps({"uri": each["path"], "sha256": each["digest"]}),
                ),
                [InputTag("mlflow.data.context", each["use"])],
            )
            for each in record.data
        ]
        for start in range(0, len(datasets), _DATASETS_LIMIT):
            client.log_inputs(self.id, datasets[start : start + _DATASETS_LIMIT])
        for path, text in record.texts.items():
            client.log_text(self.id, text, path)

    def log(self, rows: Iterable[Mapping[str, float]], names: Mapping[str, str]) -> None:
        """Log rows of a curve."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, row[column], round(row["time"] * 1000), int(row["step"]))
            for row in rows
            for column, name in names.items()
            if column in row
        ]
        self.client.log_batch(self.id, metrics=metrics)

    def end(self, record: Record) -> None:
        """Log what the run made, and then end it."""
        from mlflow.entities import LoggedModelInput, Metric

        model = self._log_model(record) if record.model else None
        figures = [(name, value, record.ended, 0) for name, value in record.metrics.items()]  # at step 0 they are bars
        if self.parent:
            shown = [Metric(*each) for each in figures if each[0] in record.headline]
            self.client.log_batch(self.parent, metrics=shown)
            for output in self.client.get_run(self.parent).outputs.model_outputs:
                model = output.model_id
                self.client.log_inputs(self.id, models=[LoggedModelInput(model)])
        self.client.log_batch(self.id, metrics=[Metric(*each, model_id=model) for each in figures])
        if record.description:
            self.client.set_tag(self.id, "mlflow.note.content", record.description)
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
        params = {key: str(value)[:VALUE_LIMIT] for key, value in shape.items()}
        digests = {f"sha256.{Path(path).name}": record.digests[path] for path in record.model}
        model = self.client.create_logged_model(self.experiment, "speculator", self.id, digests, params, "speculator")
        for path in record.model:
            self.client.log_model_artifact(model.model_id, path)
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(self.id, [LoggedModelOutput(model.model_id, record.step)])
        return str(model.model_id)


def _connect(uri: str) -> Any:
    for variable, value in _PATIENCE.items():
        os.environ.setdefault(variable, value)
    from mlflow import MlflowClient  # takes seconds, and only where it is wanted

    return MlflowClient(tracking_uri=uri)


def _answers_no_more(error: Exception) -> bool:
    """Whether a server cannot be reached or is too busy to answer, rather than refuses something."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return not isinstance(error, SpecError)
    cause = error.__cause__ or error.__context__  # requests' errors, which MLflow hides in its own, are OSErrors
    return isinstance(cause, OSError) or error.get_http_status_code() in (429, 503)


def _experiment(client: Any, uri: str, name: str) -> str:
    """The id of an experiment, which is made where it is missing; a SpecError says that it was deleted."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = Path(uri.removeprefix("sqlite:///")).resolve()
        artifacts = (database.parent / "mlartifacts").as_uri() if uri.startswith("sqlite:///") else None
        try:
            client.create_experiment(name, artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # else another run has made it just now
                raise
        found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        raise SpecError(
            f"its experiment {name!r} was deleted: `MLFLOW_TRACKING_URI={uri} mlflow experiments restore "
            f"--experiment-id {found.experiment_id}` brings it back; or name another in trainer.experiment_name"
        )
    if _VIEW not in found.tags:
        columns = {"selectedColumns": [*_WIDTHS], "columnOrder": [*_WIDTHS], "columnWidths": _WIDTHS}
        order = {"orderByKey": "metrics.`hybrid`", "orderByAsc": False, "searchFilter": "metrics.answers > 0"}
        view = {"name": "speculators", "createdAt": found.creation_time, "state": json.dumps(columns | order)}
        client.set_experiment_tag(found.experiment_id, _VIEW, json.dumps(view))
    return str(found.experiment_id)


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

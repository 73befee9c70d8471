"""MLflow: the only module that knows it. Files are the truth; this shows them, and can show them again."""

from __future__ import annotations

import contextlib
import csv
import getpass
import json
import logging
import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from spec import files, lineage
from spec.config import Config, flatten
from spec.errors import SpecError

log = logging.getLogger(__name__)

RUN_FILE = "mlflow_run.json"
RECORD_TAG = "record"
MODEL_NAME = "speculator"
TOKENS = "by_tokens/"
"""Begins the names of curves whose step is the number of tokens seen."""

_QUEUED = (".dvc", "tmp", "exps")
_VALUE_LIMIT = 6000
_DIGEST_LIMIT = 36
_LEARNED = ("speculator_loss", "loss.", "accuracy.", "tokens_per_step", "acceptance.", "base_")
"""How columns begin that are drawn against tokens seen, too."""
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""A stage must not wait minutes for a server that is gone; MLflow's own defaults are 120 s and 7 retries."""


def project_root(folder: Path | None = None) -> Path:
    """The project that a working directory belongs to; temporary experiments of dvc belong to theirs.

    Args:
        folder: default the working directory.
    """
    folder = (folder or Path.cwd()).resolve()
    for parent in (folder, *folder.parents):
        parts = parent.parts
        if parts[-3:] == _QUEUED:
            return Path(*parts[:-3])
    for parent in (folder, *folder.parents):
        if (parent / ".dvc").is_dir():
            return parent
    return folder


def named_uri(config: Config) -> str | None:
    """trainer.tracking_uri, else MLFLOW_TRACKING_URI."""
    return config.trainer.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")


def tracking_uri(config: Config) -> str:
    """trainer.tracking_uri, else MLFLOW_TRACKING_URI, else mlflow.db in the project's root."""
    return named_uri(config) or f"sqlite:///{project_root() / 'mlflow.db'}"


def without_password(text: str) -> str:
    """A text, such as an error's, whose addresses name neither user nor password."""
    return re.sub(r"(?<=://)[^\s/]*@", "", text)


@dataclass(frozen=True)
class Record:
    """What an MLflow run holds, or the files in which it lies: from it the run can be made again on any server.

    Attributes:
        id: the run's tag "record", by which it is found on a server.
        run_id: MLflow's id on the server that it was made on.
        tracking_uri: that server, without user and password.
        experiment: its name.
        name: of the run.
        parent: id of the record of the run that it belongs to.
        started, ended: milliseconds since the epoch.
        status: FINISHED, FAILED or KILLED.
        params, tags: as MLflow has them.
        data: the data files.
        texts: small artifacts by their path in MLflow.
        metrics: figures of the whole run, at `step`.
        headline: those of them that stand on the parent, too.
        curves: CSV files with a column `step` and a column `time` (seconds since the epoch), and what their columns'
            names begin with in MLflow.
        artifacts: files, and their folder in MLflow.
        model: the files of the checkpoint.
        digests: SHA-256 of every file named here.
    """

    id: str
    run_id: str
    tracking_uri: str
    experiment: str
    name: str
    parent: str | None
    started: int
    params: dict[str, str]
    tags: dict[str, str]
    data: list[lineage.DataFile]
    texts: dict[str, str]
    ended: int = 0
    status: str = "RUNNING"
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    headline: list[str] = field(default_factory=list)
    curves: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    model: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Record | None:
        """The record in a file; None where the run was not tracked.

        Raises:
            SpecError: the file is no such record.
        """
        values = files.read_json(path)
        if values == {}:
            return None
        if not isinstance(values, dict) or set(values) != {each.name for each in fields(cls)}:
            raise SpecError(f"{path} is not a record of this version; run the stage again")
        return cls(**{**values, "data": [lineage.DataFile(**file) for file in values["data"]]})

    def check_files(self) -> None:
        """Check that the files are still those of the run.

        Raises:
            SpecError: names the first that is not.
        """
        for path, digest in self.digests.items():
            if not Path(path).is_file() or files.digest_file(Path(path)) != digest:
                raise SpecError(
                    f"{path} is missing or not the file that {self.name} run {self.run_id} wrote; `dvc checkout` or "
                    "`dvc exp apply` brings results back that belong together"
                )


class Run:
    """One MLflow run, or nothing where trainer.logger leaves mlflow out.

    Args:
        config: where to track, and what to record as parameters.
        name: of the run.
        tags: beside those of lineage.tags, such as the feature digest.
        sources: base and data files; see lineage.
        splits: whose files the run reads.
        device: that it computes on.
        parent: the record of an earlier run: this run becomes its child.

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
        self._failed = False
        if "mlflow" not in config.trainer.logger:
            return
        for key, value in _PATIENCE.items():
            os.environ.setdefault(key, value)
        uri = tracking_uri(config)
        identity = uuid.uuid4().hex
        record = Record(
            id=identity,
            run_id="",
            tracking_uri=without_password(uri),
            experiment=config.trainer.experiment_name,
            name=name,
            parent=parent.id if parent else None,
            started=_now(),
            params={key: without_password(str(value))[:_VALUE_LIMIT] for key, value in flatten(config).items()},
            tags=_tags(name, identity, {**lineage.tags(sources, device), **tags}, parent),
            data=lineage.data_files(sources, splits),
            texts={"lineage/dvc.lock": lineage.LOCK.read_text()} if lineage.LOCK.is_file() else {},
        )
        try:
            self._server = _Server(uri, record)
            run_id = self._server.create()
        except Exception as error:
            cause = error.__context__
            down = isinstance(cause, OSError) and not isinstance(cause, ValueError)  # requests' errors; no bad address
            raise SpecError(
                f"MLflow at {record.tracking_uri} could not be used ({without_password(str(error))}); "
                f"{'start it, or ' if down else ''}run with trainer.logger=console"
            ) from None
        self.record = replace(record, run_id=run_id)
        self._try(lambda: self._server.send_beginning(Counter()))

    @property
    def id(self) -> str | None:
        """MLflow's id of the run."""
        return self.record.run_id if self.record else None

    def log(self, row: Mapping[str, float], prefix: str = "") -> None:
        """Show a row of a curve at once; a server that has failed before is not asked again until the run ends.

        Args:
            row: as the curve's file has it: `step`, `time` and figures by name.
            prefix: what their names begin with in MLflow.
        """
        if not self._failed:
            self._try(lambda: self._server.log(list(_points(row, prefix))))

    def finish(
        self,
        folder: Path,
        status: str = "FINISHED",
        metrics: Mapping[str, float] | None = None,
        step: int = 0,
        headline: Sequence[str] = (),
        curves: Mapping[Path, str] | None = None,
        artifacts: Mapping[Path, str] | None = None,
        model: Iterable[Path] = (),
    ) -> None:
        """Write the run's record into a folder, and send what the server does not have yet; see Record.

        A server that does not answer costs a warning, nothing else.
        """
        if self.record is None:
            files.write_json(folder / RUN_FILE, {})
            return
        curves, artifacts, model = curves or {}, artifacts or {}, list(model)
        record = replace(
            self.record,
            ended=_now(),
            status=status,
            step=step,
            metrics=dict(metrics or {}),
            headline=list(headline),
            curves={str(path): prefix for path, prefix in curves.items()},
            artifacts={str(path): name for path, name in artifacts.items()},
            model=list(map(str, model)),
            digests={str(path): files.digest_file(path) for path in (*curves, *artifacts, *model)},
        )
        files.write_json(folder / RUN_FILE, asdict(record))
        self.record = self._server.record = record
        before = self._failed
        if self._try(self._server.send) and before:
            log.warning("MLflow answers again, and has the whole run")

    def _try(self, action: Callable[[], object]) -> bool:
        """A server that dies later costs the record, never the run."""
        if self.record is None:
            return False
        try:
            action()
        except Exception as error:
            if not self._failed:
                log.warning(
                    "MLflow at %s stopped answering (%s); the stage goes on, its files hold everything, and "
                    "`spec track sync` completes the record",
                    self.record.tracking_uri,
                    without_password(str(error)),
                )
            self._failed = True
            return False
        return True


def sync(record: Record, uri: str) -> Counter[str]:
    """Send to a server whatever of a run it lacks; the run is made there where it is not. Safe to repeat.

    Returns:
        How many things of which kind were sent.

    Raises:
        SpecError: files that are no longer the run's, or a server that does not answer.
    """
    record.check_files()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", _PATIENCE["MLFLOW_HTTP_REQUEST_MAX_RETRIES"])
    try:
        server = _Server(uri, record)
        found = server.find()
        if not found:
            server.create()
        return server.send() + Counter({} if found else {"run": 1})
    except Exception as error:
        message = f"MLflow at {uri} did not take the whole run ({error}); run this again"
        raise SpecError(without_password(message)) from error


class _Server:
    """One run on one server. What it holds is compared with the record, and what it lacks is sent."""

    def __init__(self, uri: str, record: Record) -> None:
        from mlflow import MlflowClient  # takes seconds, and only where it is wanted

        self.uri = uri
        self.record = record
        self.client = MlflowClient(tracking_uri=uri)
        self.experiment = self._experiment(record.experiment)
        self.run_id = ""

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        local = self.uri.startswith("sqlite:///")
        database = Path(self.uri.removeprefix("sqlite:///")).resolve()
        artifacts = (database.parent / "mlartifacts").as_uri() if local else None
        try:
            return str(self.client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:
            found = self.client.get_experiment_by_name(name)  # another run may have made it just now
            if found is None:
                raise
            return str(found.experiment_id)

    def find(self) -> str | None:
        """The run's id, if it is here."""
        found = self._find(self.record.id)
        self.run_id = found or ""
        return found

    def _find(self, identity: str | None) -> str | None:
        """The run of a record, in whatever experiment: an evaluation may have another one than its training."""
        if identity is None:
            return None
        runs = self.client.search_runs(list(self._experiments()), f"tags.{RECORD_TAG} = '{identity}'", max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def _experiments(self) -> Iterator[str]:
        page = None
        while page is None or page.token:
            page = self.client.search_experiments(page_token=page.token if page else None)
            yield from (str(each.experiment_id) for each in page)

    def create(self) -> str:
        """Make the run; returns its id."""
        parent = self._find(self.record.parent)
        links = {"mlflow.parentRunId": parent} if parent else {}
        run = self.client.create_run(
            self.experiment,
            start_time=self.record.started,
            tags={**self.record.tags, **links},
            run_name=self.record.name,
        )
        self.run_id = str(run.info.run_id)
        return self.run_id

    def log(self, points: Iterable[Any], run_id: str | None = None) -> None:
        """Record points of curves; those that are here already are no different for it."""
        for batch in _batches(list(points), 1000):  # as many as MLflow takes at once
            self.client.log_batch(run_id or self.run_id, metrics=batch)

    def send(self) -> Counter[str]:
        """Send everything that is not here; returns how much that was."""
        sent: Counter[str] = Counter()
        self.send_beginning(sent)
        record = self.record
        run = self.client.get_run(self.run_id)
        parent = self._find(record.parent)
        model = self._send_model(run, sent) if record.model else self._take_model(run, parent)
        self._send_points(self.run_id, [*self._curves(), *self._figures(record.metrics, model)], sent)
        if parent:
            headline = {name: record.metrics[name] for name in record.headline if name in record.metrics}
            self._send_points(parent, self._figures(headline, None), sent)
        self._send_files(sent)
        if (run.info.status, run.info.end_time) != (record.status, record.ended):
            self.client.set_terminated(self.run_id, record.status, record.ended)
            sent["status"] += 1
        return sent

    def send_beginning(self, sent: Counter[str]) -> None:
        """Send what is known before the run's work."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        record, run = self.record, self.client.get_run(self.run_id)
        params = [Param(key, value) for key, value in record.params.items() if key not in run.data.params]
        for batch in _batches(params, 100):
            self.client.log_batch(self.run_id, params=batch)
        here = {(each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs}
        missing = [each for each in record.data if (each.path, each.digest[:_DIGEST_LIMIT]) not in here]
        if missing:
            self.client.log_inputs(
                self.run_id,
                [
                    DatasetInput(
                        Dataset(
                            name=each.path,
                            digest=each.digest[:_DIGEST_LIMIT],
                            source_type="local",
                            source=json.dumps({"uri": each.path, "sha256": each.digest}),
                        ),
                        [InputTag("mlflow.data.context", each.use)],
                    )
                    for each in missing
                ],
            )
        for path, text in record.texts.items():
            if path not in self._artifacts({str(Path(path).parent)}):
                self.client.log_text(self.run_id, text, path)
                sent["files"] += 1
        sent["parameters"] += len(params)
        sent["data sets"] += len(missing)

    def _send_model(self, run: Any, sent: Counter[str]) -> str:
        """The checkpoint as a logged model; returns its id."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        record = self.record
        found = self.client.search_logged_models([self.experiment], f"source_run_id = '{self.run_id}'")
        model = found[0] if found else None
        if model is None:
            (shape,) = (files.read_json(Path(path)) for path in record.model if path.endswith("config.json"))
            params = {key: str(value)[:_VALUE_LIMIT] for key, value in shape.items()}
            digests = {f"sha256.{Path(path).name}": record.digests[path] for path in record.model}
            model = self.client.create_logged_model(
                self.experiment, MODEL_NAME, self.run_id, digests, params, MODEL_NAME
            )
        sizes = {each.path: each.file_size for each in self.client.list_logged_model_artifacts(model.model_id)}
        for path in map(Path, record.model):
            if sizes.get(path.name) != path.stat().st_size:
                self.client.log_model_artifact(model.model_id, str(path))
                sent["files of the model"] += 1
        if model.status != LoggedModelStatus.READY:
            self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        if model.model_id not in {each.model_id for each in run.outputs.model_outputs}:
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, record.step)])
        return str(model.model_id)

    def _take_model(self, run: Any, parent: str | None) -> str | None:
        """The parent's model, if there is one, is what this run looks at."""
        from mlflow.entities import LoggedModelInput

        if parent is None:
            return None
        outputs = self.client.get_run(parent).outputs.model_outputs
        if not outputs:
            return None
        model = str(outputs[0].model_id)
        if model not in {each.model_id for each in run.inputs.model_inputs}:
            self.client.log_inputs(self.run_id, models=[LoggedModelInput(model)])
        return model

    def _curves(self) -> Iterator[Any]:
        for path, prefix in self.record.curves.items():
            with Path(path).open(newline="") as file:
                for row in csv.DictReader(file):
                    yield from _points({name: float(value) for name, value in row.items()}, prefix)

    def _figures(self, values: Mapping[str, float], model: str | None) -> list[Any]:
        from mlflow.entities import Metric

        ended, step = self.record.ended, self.record.step
        return [Metric(name, value, ended, step, model_id=model) for name, value in values.items()]

    def _send_points(self, run_id: str, points: Sequence[Any], sent: Counter[str]) -> None:
        keys = {point.key for point in points} & self.client.get_run(run_id).data.metrics.keys()
        here = {
            (point.key, point.step, point.timestamp)
            for key in keys
            for point in self.client.get_metric_history(run_id, key)
        }
        missing = [point for point in points if (point.key, point.step, point.timestamp) not in here]
        self.log(missing, run_id)
        sent["points"] += len(missing)

    def _send_files(self, sent: Counter[str]) -> None:
        here = self._artifacts(set(self.record.artifacts.values()))
        for name, folder in self.record.artifacts.items():
            path = Path(name)
            if here.get(f"{folder}/{path.name}") != path.stat().st_size:
                self.client.log_artifact(self.run_id, name, folder)
                sent["files"] += 1

    def _artifacts(self, folders: set[str]) -> dict[str, int]:
        """Sizes of the run's artifacts in these folders."""
        found = (self.client.list_artifacts(self.run_id, folder) for folder in sorted(folders))
        return {each.path: each.file_size for listed in found for each in listed}


def _points(row: Mapping[str, float], prefix: str) -> Iterator[Any]:
    """A curve's row as MLflow's points, against steps, and what is learned against tokens seen as well."""
    from mlflow.entities import Metric

    timestamp, step = round(row["time"] * 1000), int(row["step"])
    for name, value in row.items():
        if name in ("step", "time"):
            continue
        yield Metric(prefix + name, value, timestamp, step)
        if name.startswith(_LEARNED) and "positions_seen" in row:
            yield Metric(f"{TOKENS}{prefix}{name}", value, timestamp, int(row["positions_seen"]))


def _tags(name: str, identity: str, tags: Mapping[str, str], parent: Record | None) -> dict[str, str]:
    found = {
        RECORD_TAG: identity,
        "mlflow.source.name": f"spec {name}",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": tags["git.commit"],
        "mlflow.source.git.dirty": tags["git.dirty"],
        **tags,
    }
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        found["mlflow.user"] = getpass.getuser()
    return found | ({"trained_by": parent.run_id} if parent else {})


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _now() -> int:
    return int(time.time() * 1000)


def kept_run(folder: Path) -> Record | None:
    """The run that made a checkpoint, if one was tracked."""
    path = folder / RUN_FILE
    try:
        return Record.load(path) if path.is_file() else None
    except SpecError as error:
        log.warning("%s; this run refers to no other", error)
        return None

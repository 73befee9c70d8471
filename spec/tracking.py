"""MLflow: the only module that knows it. Files are the truth; this shows them."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spec import files
from spec.config import Config, flatten
from spec.errors import SpecError

log = logging.getLogger(__name__)

RUN_FILE = "mlflow_run.json"
_QUEUED = (".dvc", "tmp", "exps")
_VALUE_LIMIT = 6000


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


def tracking_uri(config: Config) -> str:
    """trainer.tracking_uri, else MLFLOW_TRACKING_URI, else mlflow.db in the project's root."""
    return (
        config.trainer.tracking_uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{project_root() / 'mlflow.db'}"
    )


class Run:
    """One MLflow run, or nothing where trainer.logger leaves mlflow out.

    Args:
        config: where to track, and what to record as parameters.
        name: of the run.
        tags: such as the feature digest; the git commit is added.
        parent: an earlier run's id: this run becomes its child.

    Raises:
        SpecError: the tracking server does not answer.
    """

    def __init__(self, config: Config, name: str, tags: Mapping[str, str], parent: str | None = None) -> None:
        self.id: str | None = None
        self.parent = parent
        self._failed = False
        if "mlflow" not in config.trainer.logger:
            return
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        from mlflow import MlflowClient  # takes seconds, and only where it is wanted

        uri = tracking_uri(config)
        try:
            self._client = MlflowClient(tracking_uri=uri)
            experiment = self._experiment(uri, config.trainer.experiment_name)
            links = {"mlflow.parentRunId": parent} if parent else {}
            run = self._client.create_run(
                experiment, run_name=name, tags={"mlflow.source.git.commit": git_commit(), **links, **tags}
            )
        except Exception as error:
            raise SpecError(
                f"MLflow at {uri} does not answer ({error}); start it, or run with trainer.logger=console"
            ) from None
        self.id = run.info.run_id
        self._try(self._log_params, config)

    def _experiment(self, uri: str, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        local = uri.startswith("sqlite:///")
        artifacts = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri() if local else None
        return str(self._client.create_experiment(name, artifact_location=artifacts))

    def _log_params(self, config: Config) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:_VALUE_LIMIT]) for key, value in flatten(config).items()]
        self._client.log_batch(self.id, params=params)

    def log(self, metrics: Mapping[str, float], step: int = 0, to_parent: bool = False) -> None:
        """Record metrics at a step."""
        self._try(self._log, metrics, step, to_parent)

    def _log(self, metrics: Mapping[str, float], step: int, to_parent: bool) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        self._client.log_batch(self.id, metrics=batch)
        if to_parent and self.parent:
            self._client.log_batch(self.parent, metrics=batch)

    def artifacts(self, folder: Path, name: str) -> None:
        """Record a folder's files under a name."""
        self._try(lambda: self._client.log_artifacts(self.id, str(folder), name))

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run: FINISHED, FAILED or KILLED."""
        self._try(lambda: self._client.set_terminated(self.id, status))

    def _try(self, action: Any, *arguments: Any) -> None:
        """A server that dies later costs the record, never the run."""
        if self.id is None:
            return
        try:
            action(*arguments)
        except Exception as error:
            if not self._failed:
                log.warning("MLflow stopped answering (%s); the stage goes on, and its files hold everything", error)
            self._failed = True


def git_commit() -> str:
    """The commit that is checked out, with "-dirty" where files differ from it; "none" outside a repository."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return answer.stdout.strip()


def keep_run(folder: Path, run: Run, uri: str) -> None:
    """Write down beside a checkpoint which run made it."""
    if run.id is not None:
        files.write_json(folder / RUN_FILE, {"run_id": run.id, "tracking_uri": uri})


def kept_run(folder: Path) -> str | None:
    """The run that made a checkpoint, if one did."""
    path = folder / RUN_FILE
    return files.read_json(path)["run_id"] if path.is_file() else None

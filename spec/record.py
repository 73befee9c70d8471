"""The record of a run: one small file next to its results from which MLflow's run can be made on any server."""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from spec import files, lineage
from spec.config import Config, flatten
from spec.errors import SpecError

log = logging.getLogger(__name__)

RUN_FILE = "mlflow_run.json"
VALUE_LIMIT = 6000
"""Characters of a parameter that MLflow takes."""
_TAGS = (
    *("method", "features", "base.name", "base.revision", "base.weights", "hardware.device", "hardware.workers"),
    *("git.commit", "git.dirty", "dvc.lock"),
)
"""What a run follows from, as far as its page has room for it; lineage/lineage.json has everything."""


class ChangedError(SpecError):
    """Results that are not those of the run that names them."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything that a run in MLflow holds, or the file that holds it.

    Attributes:
        metrics: figures of the whole run.
        step: the optimizer step that the model is from.
        headline: the names of those metrics that stand on the parent, too.
        curves: CSV files with the columns `step` and `time` (seconds since the epoch), and of each file the columns
            that MLflow shows with their names there.
        artifacts: files, and their folder in MLflow.
        model: the files of the checkpoint.
        description: Markdown on the run's page.
        id: the tag "record" of every run that was made from this record.
        run_id: MLflow's id of the run that was logged live.
        tracking_uri: the server that it was logged to, without user and password.
        parent: the id of the parent's record.
        started, ended: milliseconds since the epoch.
        status: FINISHED, FAILED or KILLED.
        data: of each data file its path, its SHA-256 as digest, and its use, which is the splits that it serves.
        texts: small artifacts by their path in MLflow.
        digests: the SHA-256 of every curve, artifact and file of the model.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    headline: list[str] = field(default_factory=list)
    curves: dict[str, dict[str, str]] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    model: list[str] = field(default_factory=list)
    description: str = ""
    id: str
    run_id: str
    tracking_uri: str
    experiment: str
    name: str
    parent: str | None
    started: int
    ended: int = 0
    status: str = "RUNNING"
    params: dict[str, str]
    tags: dict[str, str]
    data: list[dict[str, str]]
    texts: dict[str, str]
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
        return cls(**values)

    def digests_now(self) -> dict[str, str]:
        """The SHA-256 of every file named here, as it is now."""
        return {path: files.digest_file(Path(path)) for path in (*self.curves, *self.artifacts, *self.model)}

    def check_files(self) -> None:
        """Check that the files are still those of the run; a ChangedError names the first that is not."""
        for path, digest in self.digests.items():
            if not Path(path).is_file() or files.digest_file(Path(path)) != digest:
                raise ChangedError(f"{path} is missing or not the file that {self.name} run {self.run_id} wrote")


def begin(
    config: Config,
    uri: str,
    name: str,
    tags: Mapping[str, str],
    sources: Mapping[str, Any],
    splits: tuple[str, ...],
    device: torch.device,
    parent: Record | None,
) -> Record:
    """The record of a run that begins now, without MLflow's id; the arguments are those of spec.tracking.Run."""
    tags = {**lineage.tags(sources, device), **tags}
    source = {"mlflow.source.name": f"spec {name}", "mlflow.source.type": "LOCAL"}
    source |= {f"mlflow.source.git.{key}": tags[f"git.{key}"] for key in ("commit", "dirty")}
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        source["mlflow.user"] = getpass.getuser()
    lock = {"lineage/dvc.lock": lineage.LOCK.read_text()} if lineage.LOCK.is_file() else {}
    return Record(
        id=uuid.uuid4().hex,
        run_id="",
        tracking_uri=uri,
        experiment=config.trainer.experiment_name,
        name=name,
        parent=parent.id if parent else None,
        started=time.time_ns() // 1_000_000,
        params={key: without_password(str(value))[:VALUE_LIMIT] for key, value in flatten(config).items()},
        tags=source
        | {name: tags[name] for name in _TAGS if name in tags}
        | ({"trained_by": parent.run_id} if parent else {}),
        data=lineage.data_files(sources, splits),
        texts={"lineage/lineage.json": json.dumps(tags, indent=1)} | lock,
    )


def without_password(text: str) -> str:
    """A text, such as an error's, whose addresses name neither user nor password."""
    return re.sub(r"(?<=://)[^\s/]*@", "", text)


def kept(folder: Path) -> Record | None:
    """The record of the run that made a checkpoint, if one was tracked."""
    path = folder / RUN_FILE
    try:
        return Record.load(path) if path.is_file() else None
    except SpecError as error:
        log.warning("%s; this run is not linked to the run that trained the checkpoint", error)
        return None

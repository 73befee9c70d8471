"""track: complete the record of runs in MLflow: sync."""

from __future__ import annotations

from pathlib import Path

import click

from spec import tracking
from spec.config import Config
from spec.errors import SpecError
from stages import common, evaluate, train


@click.group()
def track() -> None:
    """Look after the record of runs in MLflow."""


@common.stage_of(track)
def sync(config: Config) -> None:
    """Send to MLflow what it lacks of the runs whose results lie here.

    The server is that of trainer.tracking_uri or MLFLOW_TRACKING_URI, else the one that the run was made on. A run that
    is not there is made there. Nothing is sent twice.
    """
    paths = [folder / tracking.RUN_FILE for folder in (common.MODEL, train.RESULTS, evaluate.RESULTS)]
    tracked, problems = False, []
    for path in filter(Path.is_file, paths):
        try:
            tracked |= _send(config, path)
        except SpecError as error:  # what lies beside it is sent all the same
            problems.append(str(error))
    if problems:
        raise SpecError("\n".join(problems))
    if not tracked:
        raise SpecError(
            f"no tracked run lies here (none of {', '.join(map(str, paths))} names one); run train or evaluate with "
            "mlflow in trainer.logger"
        )


def _send(config: Config, path: Path) -> bool:
    """Send what a server lacks of one record; whether there is a run in it."""
    record = tracking.Record.load(path)
    if record is None:
        common.say(f"track: {path} is of a run without MLflow")
        return False
    uri = tracking.named_uri(config) or record.tracking_uri
    sent = tracking.sync(record, uri)
    what = ", ".join(f"{count} {name}" for name, count in sent.items() if count)
    where = f"{record.name} run {record.run_id} at {tracking.without_password(uri)}"
    common.say(f"track: {where}: {f'sent {what}' if what else 'all was there'}")
    return True


if __name__ == "__main__":
    track()

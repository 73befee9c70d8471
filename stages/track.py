"""track: complete the record of runs in MLflow: sync."""

from __future__ import annotations

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
    found = {path: tracking.Record.load(path) for path in paths if path.is_file()}
    if not any(found.values()):
        raise SpecError(
            f"no tracked run lies here (none of {', '.join(map(str, paths))} names one); run train or evaluate with "
            "mlflow in trainer.logger"
        )
    for path, record in found.items():
        if record is None:
            common.say(f"track: {path} is of a run without MLflow")
            continue
        uri = tracking.named_uri(config) or record.tracking_uri
        sent = tracking.sync(record, uri)
        what = ", ".join(f"{count} {name}" for name, count in sent.items() if count)
        common.say(f"track: {record.name} run {record.run_id} at {uri}: {f'sent {what}' if what else 'all was there'}")


if __name__ == "__main__":
    track()

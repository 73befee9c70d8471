"""track: show finished runs in MLflow: sync."""

from __future__ import annotations

from pathlib import Path

import click

from spec import tracking
from spec.config import Config
from spec.errors import SpecError
from spec.record import RUN_FILE, Record, without_password
from stages import common


@click.group()
def track() -> None:
    """Look after the runs in MLflow."""


@common.stage
def sync(config: Config) -> None:
    """Send the runs whose results are here to a server, if it does not have them or not completely.

    The server is that of trainer.tracking_uri or MLFLOW_TRACKING_URI, else the one that the run was logged to. Each run
    is made again from its files; an incomplete one that the server has is tagged as replaced.
    """
    paths = [folder / RUN_FILE for folder in (common.MODEL, common.TRAIN_RESULTS, common.EVALUATE_RESULTS)]
    tracked, problems = False, []
    for path in filter(Path.is_file, paths):  # an evaluation comes after its training, and becomes its child
        try:
            record = Record.load(path)
            if record is None:
                common.say(f"track: {path} is of a run without MLflow")
                continue
            tracked = True
            uri = tracking.tracking_uri(config, record.tracking_uri)
            made = tracking.sync(record, uri)
            what = f"made again as run {made}" if made else "is there, complete"
            common.say(f"track: {record.name} run {record.run_id} {what}, at {without_password(uri)}")
        except SpecError as error:  # the other runs are sent all the same
            problems.append(common.advice(error))
    if problems:
        raise SpecError("\n".join(problems))
    if not tracked:
        raise SpecError(
            f"no tracked run lies here (none of {', '.join(map(str, paths))} names one); run train or evaluate with "
            "mlflow in trainer.logger"
        )


track.add_command(sync)

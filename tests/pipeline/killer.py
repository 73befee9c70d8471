"""A process that runs stages in children of its own, and kills them; it serves as producer does."""

import os
from pathlib import Path
from typing import Any

import pytest

import stages.train
from stages import cli
from tests.forked import run_killing
from tests.spec.store.producer import serve
from tests.stages.workspace import inline_workers

assert stages.train  # loaded before the fork


def run(folder: str, stage: str, delay: float | None = None) -> dict[str, Any]:
    """Run a stage in a folder, its worker in the same process, as run_killing does."""

    def body() -> None:
        os.chdir(folder)
        log = os.open(Path(folder) / ".log-of-stages", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        inline_workers(pytest.MonkeyPatch())
        cli.main([stage], standalone_mode=False)

    return run_killing(body, delay)


if __name__ == "__main__":
    serve(run)

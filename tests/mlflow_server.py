"""A tracking server of the tests' own, in a process that can be killed, and what a server must have of a run."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient

from spec.record import Record
from tests.forked import free_port

COMMAND = (
    *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", "{port}", "--workers", "1"),
    *("--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "artifacts"),
)


class Server:
    """A server on the loopback that may be killed and started again; it runs in a folder, and its log is server.log."""

    def __init__(self, folder: Path, command: Sequence[str] = COMMAND) -> None:
        port = free_port()
        self.folder = folder
        self.command = [part.format(port=port) for part in command]
        self.uri = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 300) -> None:
        with (self.folder / "server.log").open("ab") as log:
            pipes = {"stdout": log, "stderr": log}
            self.process = subprocess.Popen(self.command, cwd=self.folder, start_new_session=True, **pipes)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=10):
                return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.1)
        raise AssertionError(f"{self.command} did not answer in {seconds} s")

    def kill(self) -> None:
        """End it at once, with every process that it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def check_run(uri: str, run_id: str, record: Record) -> None:
    """A server has everything of a run, as its record and its files have it, and has it once."""
    client = MlflowClient(uri)
    run = client.get_run(run_id)
    info, data = run.info, run.data
    found = (info.run_name, info.status, info.start_time, info.end_time)
    assert found == (record.name, record.status, record.started, record.ended)
    assert data.params == record.params
    assert data.tags.items() >= {**record.tags, "record": record.id}.items()
    points = {name: [(0, record.ended, value)] for name, value in record.metrics.items()}
    for path, names in record.curves.items():
        with Path(path).open() as file:
            for row in csv.DictReader(file):
                at = round(float(row.pop("time")) * 1000)
                for column, name in ((column, name) for column, name in names.items() if column in row):
                    points.setdefault(name, []).append((int(row["step"]), at, float(row[column])))
    for name, expected in points.items():
        logged = [(point.step, point.timestamp, point.value) for point in client.get_metric_history(run_id, name)]
        assert sorted(logged) == expected, name
    for path, folder in record.artifacts.items():
        artifact = client.download_artifacts(run_id, f"{folder}/{Path(path).name}")
        assert Path(artifact).read_bytes() == Path(path).read_bytes()
    inputs = {(each.dataset.name, each.dataset.digest, each.tags[0].value) for each in run.inputs.dataset_inputs}
    assert inputs == {(each["path"], each["digest"][:36], each["use"]) for each in record.data}
    models = [client.get_logged_model(output.model_id) for output in run.outputs.model_outputs]
    assert [(each.name, each.status.name, each.source_run_id) for each in models] == (
        [("speculator", "READY", run_id)] if record.model else []
    )
    sizes = {each.path: each.file_size for one in models for each in client.list_logged_model_artifacts(one.model_id)}
    assert sizes == {Path(path).name: Path(path).stat().st_size for path in record.model}

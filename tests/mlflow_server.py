"""A tracking server of the tests' own, in a process that can be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

COMMAND = (
    *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", "{port}", "--workers", "1"),
    *("--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "artifacts"),
)


class Server:
    """A server on the loopback whose command may be killed and started again; its log is FOLDER/server.log.

    Args:
        folder: in which it runs.
        command: default `mlflow server` with a database and artifacts in the folder; {port} is filled in.
    """

    def __init__(self, folder: Path, command: Sequence[str] = COMMAND) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder = folder
        self.command = [part.format(port=port) for part in command]
        self.uri = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 300) -> None:
        """Start it and wait until it answers."""
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
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

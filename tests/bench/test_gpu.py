"""The check for GPUs, dry: from a bundle, on a machine that has torch and transformers alone and no network."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu.check import SHARES, read
from tests.workspace import REPOSITORY

LOOPBACK_UP = """
import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh22x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS: up, running
"""
ALONE = ["unshare", "--net", "--map-root-user"]
"""Runs a command where there is no network but a loopback device, which is down."""


def other_python() -> tuple[str, str]:
    """Python 3.12 where there is one, else this one; its path and version."""
    found = [shutil.which("python3.12"), *sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python3.12"))]
    for path in filter(None, found):
        if subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return str(path), "3.12"
    return sys.executable, f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.mark.slow
def test_every_figure_comes_from_a_bundle_and_without_a_network(tmp_path: Path) -> None:
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("this machine makes no network namespaces")
    python, version = other_python()
    bare = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    bundle, there, out = tmp_path / "bundle", tmp_path / "there", tmp_path / "out"

    def run(*command: object) -> str:
        arguments = list(map(str, command))
        return subprocess.run(arguments, cwd=REPOSITORY, env=bare, check=True, stdout=-1, text=True).stdout

    run(sys.executable, "-m", "bench.bundle", "build", "--python", version, "--to", bundle)
    parts = sorted(bundle.iterdir())
    assert len(parts) <= 3
    assert all(part.stat().st_size <= 50_000_000 for part in parts)

    run(python, "-m", "venv", tmp_path / "venv")
    python = str(tmp_path / "venv/bin/python")
    run(python, "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt", "torch", "transformers")
    said = [run(python, "bench/bundle.py", "unpack", part, there) for part in parts][-1]
    assert f"go on with: . {there}/activate" in said

    script = f"{python} -c '{LOOPBACK_UP}' && . {there}/activate && exec {python} -m bench.gpu \"$@\""
    options = ["--minutes", "5", "--out", str(out), "--device", "cpu", "--small"]
    print(run(*ALONE, "sh", "-c", script, "sh", *options))  # fails where a section fails
    found = {(section, name): value for section, name, value, _ in read(out)}
    assert {section for section, _ in found} == set(SHARES)
    assert re.fullmatch(r"\d+ passed", found["right", "tests"])
    assert found["default", "identical to plain decoding in float32"] == "yes"
    assert "**A dry run: these figures mean nothing.**" in (out / "report.md").read_text()
    written = list(out.rglob("*"))
    assert len(written) <= 8
    assert all(path.stat().st_size < 2**24 for path in written)

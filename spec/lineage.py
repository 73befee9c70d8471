"""What decides a run's result besides its parameters: code, pipeline, base, data files, machine, versions."""

import contextlib
import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from spec import files
from spec.device import arithmetic

log = logging.getLogger(__name__)

PIPELINE, LOCK = Path("dvc.yaml"), Path("dvc.lock")
_PACKAGES = ("speculator-training", "torch", "transformers", "zarr", "numpy", "dvc", "mlflow")


def data_files(sources: Mapping[str, Any], splits: tuple[str, ...]) -> list[dict[str, str]]:
    """The files of these splits, as data/sources.json names them: path, digest (SHA-256) and use ("train, val")."""
    uses: dict[tuple[str, str], list[str]] = {}
    for split in splits:
        for file in sources.get("files", {}).get(split, {}).items():
            uses.setdefault(file, []).append(split)
    return [{"path": path, "digest": digest, "use": ", ".join(names)} for (path, digest), names in uses.items()]


def tags(sources: Mapping[str, Any], device: torch.device) -> dict[str, str]:
    """Everything by name: `git.*`, `dvc.*`, `base.*`, `hardware.*`, `version.*`.

    `sources` is data/sources.json, or its "base" alone.
    """
    commit, dirty = git_state()
    found = {"git.commit": commit, "git.dirty": str(dirty).lower()}
    found["dvc.lock"] = files.digest_file(LOCK) if LOCK.is_file() else "none"
    if experiment := os.environ.get("DVC_EXP_NAME"):  # dvc sets it in its experiments
        found["dvc.experiment"] = experiment
    found |= {f"base.{name}": str(value) for name, value in sources["base"].items() if value is not None}
    return found | _hardware(device) | _versions()


def git_state() -> tuple[str, bool]:
    """The commit that is checked out, and whether files differ from it; ("none", False) without one.

    In the project's own folder, which should have one, a warning then says so.
    """
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    except OSError as error:
        said = f"it could not be started ({error.strerror})"
    else:
        if answer.returncode == 0:
            commit, _, dirty = answer.stdout.strip().partition("-")
            return commit, bool(dirty)
        said = answer.stderr.strip().removeprefix("fatal: ")
    if PIPELINE.is_file():
        log.warning("git: %s. Without a commit (git init, git add, git commit) a run does not say what made it", said)
    return "none", False


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _hardware(device: torch.device) -> dict[str, str]:
    """The machine of this process; `bfloat16` is whether the device computes in it."""
    found = {
        "hardware.cpu": cpu_name(),
        "hardware.cores": str(os.cpu_count()),
        "hardware.memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "hardware.bfloat16": str(arithmetic("bfloat16", device) == torch.bfloat16).lower(),
        "hardware.device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["hardware.device"] = properties.name
        found["hardware.device_memory"] = f"{properties.total_memory / 1e9:.1f} GB"
    return found


def _versions() -> dict[str, str]:
    """Python's, CUDA's, and those of the packages that results depend on."""
    found = {"version.python": platform.python_version()}
    if torch.version.cuda:
        found["version.cuda"] = torch.version.cuda
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[f"version.{name}"] = metadata.version(name)
    return found

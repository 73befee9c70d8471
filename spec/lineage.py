"""What a run follows from beside its parameters: code, pipeline, base, data files, machine, versions."""

import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from spec import files
from spec.device import arithmetic

log = logging.getLogger(__name__)

PIPELINE, LOCK = Path("dvc.yaml"), Path("dvc.lock")
_FIRST_COMMIT = {
    "not a git repository": "git init && git add --all && git commit --message=first",
    "bad revision": "git add --all && git commit --message=first",
}
"""What git says where there is no commit, and what to type."""
_PACKAGES = ("speculator-training", "torch", "transformers", "zarr", "numpy", "dvc", "mlflow")


@dataclass(frozen=True)
class DataFile:
    """A file that a run learned from or was measured on, as data/sources.json has it."""

    path: str
    digest: str  # SHA-256
    use: str  # the splits it serves, such as "train" or "train, val"


def data_files(sources: Mapping[str, Any], splits: tuple[str, ...]) -> list[DataFile]:
    """The files of these splits, as data/sources.json names them; a file of two splits comes once."""
    uses: dict[tuple[str, str], list[str]] = {}
    for split in splits:
        for path, digest in sources.get("files", {}).get(split, {}).items():
            uses.setdefault((path, digest), []).append(split)
    return [DataFile(path, digest, ", ".join(names)) for (path, digest), names in uses.items()]


def tags(sources: Mapping[str, Any], device: torch.device) -> dict[str, str]:
    """Everything by name: `git.*`, `dvc.*`, `base.*`, `hardware.*`, `version.*`.

    `sources` is data/sources.json, or its "base" alone.
    """
    commit, dirty = git_state()
    found = {"git.commit": commit, "git.dirty": str(dirty).lower(), "dvc.lock": lock_digest()}
    experiment = os.environ.get("DVC_EXP_NAME")  # dvc sets it in its experiments
    if experiment:
        found["dvc.experiment"] = experiment
    found |= {f"base.{name}": str(value) for name, value in sources["base"].items() if value is not None}
    found |= {f"hardware.{name}": value for name, value in hardware(device).items()}
    return found | {f"version.{name}": value for name, value in versions().items()}


def git_state() -> tuple[str, bool]:
    """The commit that is checked out, and whether files differ from it; ("none", False) without one.

    In the project's own folder, which should have one, a warning then says what to type.
    """
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        said, remedy = f"it could not be started ({error.strerror})", ""
    else:
        if answer.returncode == 0:
            commit, _, dirty = answer.stdout.strip().partition("-")
            return commit, bool(dirty)
        said = answer.stderr.strip().removeprefix("fatal: ")
        remedy = next((f"; `{typed}` begins one" for words, typed in _FIRST_COMMIT.items() if words in said), "")
    if PIPELINE.is_file():
        log.warning("git: %s%s. Until then a run does not say which code made it", said, remedy)
    return "none", False


def lock_digest() -> str:
    """SHA-256 of dvc.lock in the working directory, or "none"."""
    return files.digest_file(LOCK) if LOCK.is_file() else "none"


def hardware(device: torch.device) -> dict[str, str]:
    """The machine of this process; `bfloat16` is whether the device computes in it."""
    found = {
        "cpu": cpu_name(),
        "cores": str(os.cpu_count()),
        "memory": _gigabytes(psutil.virtual_memory().total),
        "bfloat16": str(arithmetic("bfloat16", device) == torch.bfloat16).lower(),
    }
    if device.type != "cuda":
        return found | {"device": device.type}
    properties = torch.cuda.get_device_properties(device)
    return found | {"device": properties.name, "device_memory": _gigabytes(properties.total_memory)}


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def versions() -> dict[str, str]:
    """Python's, CUDA's, and those of the packages that results depend on."""
    found = {"python": platform.python_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

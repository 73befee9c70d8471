"""Files: atomic writes, digests that are computed once, the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """The folder shared by every project of this user: the default store, the embedded base, digests."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "speculator-training"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` and move it over `path` when the block ends well: whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, with a final newline."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON."""
    return json.loads(path.read_text())


def digest_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file, remembered by (path, size, modification time) so that an unchanged file is not read.

    The memory lies in the user's cache folder; losing it costs only time.
    """
    memory_path = cache_dir() / "digests.json"
    try:
        found = read_json(memory_path)
    except (OSError, ValueError):
        found = None
    memory: dict[str, Any] = found if isinstance(found, dict) else {}
    known = dict(memory)
    digests: dict[str, str] = {}
    for path in paths:
        real = path.resolve()
        status = real.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        entry = known.get(str(real))
        if entry is None or entry[:2] != stamp:
            entry = [*stamp, digest_file(real)]
            known[str(real)] = entry
        digests[str(path)] = entry[2]
    if known != memory:
        with contextlib.suppress(OSError):
            write_json(memory_path, known)
    return digests


def free_bytes(path: Path) -> int:
    """Free space where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free

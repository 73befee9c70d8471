"""Files: what is there whole or not at all, digests that are computed once, the user's cache folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spec.errors import SpecError


def cache_dir() -> Path:
    """The folder shared by every project of this user: the default store, the embedded base, digests."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "speculator-training"


PARTIAL = ".partial"
"""Ends the names of what is being written; `sweep` removes what killed processes have left of it."""


@contextlib.contextmanager
def whole(path: Path, folder: bool = False) -> Iterator[Path]:
    """Give a name next to `path`; what the block writes there takes the place of `path` when the block ends well.

    So a file or a folder is there whole or not at all, whatever fails or is killed. What was at `path` before stays
    until then, and comes back where the new one cannot take its place. Two processes that write the same path wait
    for each other.

    Args:
        path: parents that are missing are made.
        folder: whether it is one; the block is then given a new, empty one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = path.with_name(f".{path.name}{PARTIAL}"), path.with_name(f".{path.name}.old")
    with _held(temporary, folder):
        if folder and aside.exists():  # a process was killed while it replaced the folder
            remove(aside) if path.exists() else aside.rename(path)
        try:
            yield temporary
            for each in [*temporary.rglob("*"), temporary] if folder else [temporary]:
                if folder and each.is_file():  # some libraries keep what they write to the user alone
                    each.chmod(temporary.stat().st_mode & 0o666)
                flush(each)
            if folder and path.exists():
                _exchange(temporary, path, aside)
            else:
                temporary.replace(path)
        except BaseException:
            remove(temporary)
            raise
        flush(path.parent)


@contextlib.contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """Give a new folder `.NAME-*.partial` that goes when the block ends; those of killed processes go first."""
    sweep(parent, f".{name}-*{PARTIAL}")
    temporary = parent / f".{name}-{uuid.uuid4().hex[:8]}{PARTIAL}"
    with _held(temporary, folder=True):
        try:
            yield temporary
        finally:
            remove(temporary)


def sweep(folder: Path, pattern: str = f".*{PARTIAL}") -> None:
    """Remove what killed processes were writing in a folder; what a living one writes stays."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError), _held(path, path.is_dir(), wait=False):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it; nothing happens where there is none.

    This and `whole` are the only places that remove or replace anything: callers name what this program has made.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move(path: Path, target: Path) -> None:
    """Give a file or folder another name, where there is nothing yet.

    Raises:
        FileExistsError: there is something.
    """
    if target.exists():
        raise FileExistsError(errno.EEXIST, "it is there already", str(target))
    path.rename(target)


@contextlib.contextmanager
def _held(path: Path, folder: bool, wait: bool = True) -> Iterator[None]:
    """Make an empty file or folder, and hold a lock on it, which the system releases when this process dies.

    Raises:
        OSError: it is held by another process, or cannot be locked here, and `wait` is false.
    """
    while True:
        if folder:
            path.mkdir(exist_ok=True)
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Where a file system has no locks, two writers of one path may disturb each other.
            with contextlib.suppress(OSError) if wait else contextlib.nullcontext():
                fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(handle, path):  # else its holder has renamed it meanwhile
                for left in path.iterdir() if folder else ():
                    remove(left)
                if not folder:
                    os.ftruncate(handle, 0)
                yield
                return
        finally:
            os.close(handle)


def _same(handle: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.fstat(handle).st_ino == path.stat().st_ino
    return False


def _exchange(new: Path, old: Path, aside: Path) -> None:
    """Let a folder take the place of another, which is removed; it comes back where that fails."""
    try:
        old.rename(aside)
    except OSError as error:  # a mount point, or the working directory
        raise SpecError(f"{old} cannot be replaced ({error.strerror}); name a folder that is not there yet") from None
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    remove(aside)


def flush(path: Path) -> None:
    """Force a file or a folder's entries to the disk, so that a rename never outlives the data."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, with a final newline."""
    with whole(path) as temporary:
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

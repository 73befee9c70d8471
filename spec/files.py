"""Files: what is there whole or not at all, digests that are computed once, the user's cache folder."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import platform
import re
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


PARTIAL, OLD = ".partial", ".old"
"""The suffixes of temporary files and folders, and of a folder that is being replaced."""
_HOST = re.sub("[^a-z0-9]", "", platform.node().lower())
"""Is in their names: on a shared file system, no machine can tell whether a process of another one lives."""


@contextlib.contextmanager
def whole(path: Path, folder: bool = False) -> Iterator[Path]:
    """Give a temporary name next to `path`; what the block writes there takes the place of `path` when it ends well.

    So a file or a folder is there whole or not at all, whatever fails or is killed. A folder that is replaced is away
    for the moment between two renames; it comes back where the second one fails, or at the next call after a kill. A
    SpecError names a folder that cannot be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    with _temporary(path, folder) as temporary:
        yield temporary
        for each in [*temporary.rglob("*"), temporary] if folder else [temporary]:
            if folder and each.is_file():  # some libraries keep what they write to the user alone
                each.chmod(temporary.stat().st_mode & 0o666)
            _flush(each)
        if folder and path.exists():
            _exchange(temporary, path)
        else:
            temporary.replace(path)
    _flush(path.parent)


@contextlib.contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """Give a new folder whose name begins with .NAME, which is removed when the block ends."""
    sweep(parent, name)
    with _temporary(parent / name, folder=True) as temporary:
        yield temporary


def sweep(parent: Path, name: str | None = None) -> None:
    """Remove what killed processes of this machine left of `whole` and `scratch`, for a name or for all."""
    start = f".{'*' if name is None else glob.escape(name)}-{_HOST}-*"
    for path in parent.glob(start + PARTIAL):
        with contextlib.suppress(OSError), _locked(path, wait=False):
            _settle(path.with_suffix(OLD))
            remove(path)
    for aside in parent.glob(start + OLD):
        if not aside.with_suffix(PARTIAL).exists():
            _settle(aside)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder and all that is in it, if it is there. Pass only what this program made."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def move(path: Path, target: Path) -> None:
    """Give a file or folder another name; a FileExistsError says that the name is taken."""
    if target.exists():
        raise FileExistsError(errno.EEXIST, "it is there already", str(target))
    path.rename(target)


@contextlib.contextmanager
def _temporary(path: Path, folder: bool) -> Iterator[Path]:
    """An empty file or folder with a name of its own, locked; it is removed unless it has been renamed."""
    temporary = path.with_name(f".{path.name}-{_HOST}-{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        with contextlib.ExitStack() as locks:
            held = False
            while not held:  # another process may sweep it before it is locked: then it is made again
                if folder:
                    temporary.mkdir()
                else:
                    temporary.touch()
                with contextlib.suppress(FileNotFoundError):
                    locks.enter_context(_locked(temporary, wait=True))
                    held = temporary.exists()
            yield temporary
    finally:
        remove(temporary)


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold a lock on a file or folder until this process dies at the latest; without `wait`, an OSError says that
    another process holds it or that the file system has no locks."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if wait else contextlib.nullcontext():
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _settle(aside: Path) -> None:
    """After a kill between two renames the old folder comes back; where the new one is in its place, it goes."""
    original = aside.with_name(aside.name[1:].rsplit("-", 2)[0])
    with contextlib.suppress(FileNotFoundError):
        if original.exists():
            remove(aside)
        else:
            aside.rename(original)


def _exchange(new: Path, old: Path) -> None:
    """Let a folder take the place of another, which is removed; it comes back where that fails."""
    aside = new.with_suffix(OLD)
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


def _flush(path: Path) -> None:
    """Force a file or a folder's entries to the disk, so that a rename never outlives the data."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all."""
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
    """SHA-256 of each file, remembered in the user's cache by (path, size, modification time), so that an unchanged
    file is not read again."""
    memory, known = cache_dir() / "digests.json", {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = dict(read_json(memory))
    before, digests = dict(known), {}
    for path in paths:
        real, status = str(path.resolve()), path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        if known.get(real, [])[:2] != stamp:
            known[real] = [*stamp, digest_file(path)]
        digests[str(path)] = known[real][2]
    if known != before:
        with contextlib.suppress(OSError):
            write_json(memory, known)
    return digests


def free_bytes(path: Path) -> int:
    """Free space where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free

"""Locks between processes, which the system itself releases when their holder dies.

A lock is flock(2) on a small file, so a killed worker frees what it held at once: no heartbeat, no time-out. On a
file system shared by several machines it needs one that offers flock there (NFS 4, Lustre mounted with flock, ...).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from spec import files
from spec.errors import SpecError


class Lock:
    """An exclusive lock that is held until release; its file goes with it."""

    def __init__(self, path: Path, handle: int) -> None:
        self._path = path
        self._handle: int | None = handle

    @classmethod
    def acquire(cls, path: Path, wait: bool = False) -> Lock | None:
        """Take the lock of a file, which is made where it is missing; None where another holder has it, unless told to
        `wait` for it."""
        while (handle := _held(path, fcntl.LOCK_EX, wait)) is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(handle).st_ino == path.stat().st_ino:
                    return cls(path, handle)
            os.close(handle)  # its holder removed it while we were about to lock it: try the new one
        return None

    def release(self) -> None:
        """Give the lock back; a second time does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            files.remove(self._path)
            os.close(handle)


def in_use(root: Path) -> AbstractContextManager[None]:
    """Let no other process be `alone` with this folder while the block runs; any number may be in use of it."""
    return _whole(root, fcntl.LOCK_SH, "is being cleaned by another process; try again when it has ended")


def alone(root: Path) -> AbstractContextManager[None]:
    """Let no other process be `in_use` of this folder while the block runs."""
    return _whole(root, fcntl.LOCK_EX, "is in use by a running stage; try again when it has ended")


@contextlib.contextmanager
def _whole(root: Path, kind: int, refusal: str) -> Iterator[None]:
    root.mkdir(parents=True, exist_ok=True)
    handle = _held(root / ".in-use", kind)
    if handle is None:
        raise SpecError(f"the store {root} {refusal}")
    try:
        yield
    finally:
        os.close(handle)


def _held(path: Path, kind: int, wait: bool = False) -> int | None:
    """The file, opened and locked; None where another process holds a lock that excludes this one."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            return None
        if isinstance(error, OSError) and error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise SpecError(
                f"{path.parent} is on a file system without file locks ({error.strerror}), which workers need to "
                "share their work; set features.store to a folder on another one, or mount this one with flock"
            ) from None
        raise
    return handle

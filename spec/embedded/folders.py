"""Folders that appear whole or not at all, and links to them."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def scratch_beside(folder: Path) -> Iterator[Path]:
    """A temporary folder on the same file system as folder, removed at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        yield Path(scratch)


def publish(built: Path, folder: Path) -> None:
    """Move a finished folder into place; when another process was first, its folder stays and built is dropped."""
    for path in sorted(built.rglob("*")):
        if path.is_file():
            path.chmod(0o644)
            _sync(path)
    built.chmod(0o755)
    try:
        built.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(built)
    _sync(folder.parent)


def link(path: Path, target: Path) -> None:
    """Make path a symbolic link to target, replacing an older link in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        fresh = Path(scratch) / path.name
        fresh.symlink_to(target, target_is_directory=True)
        fresh.replace(path)


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

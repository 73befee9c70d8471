"""Fills a store on a disk that is full: `python -m tests.spec.store.full_disk BASE MOUNT`.

Run where MOUNT may be mounted on: as root, or under `unshare --map-root-user --mount`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spec import base as base_model
from spec.base import Base
from spec.config import Model
from spec.store import upkeep
from tests.spec.store import producer

ROOM = (0, 40, 80, 110, 130)
"""KiB that are free while a run is tried; a whole store takes more."""


def digests(root: Path, kind: str) -> dict[str, str]:
    """Of all segments, which must be whole, without anything beside them."""
    collection = producer.collection(root, kind)
    found = {name: record.digest for name, record in collection.records().items()}
    assert {path.name for path in collection.folder.glob("*/")} == set(found)
    whole, problems = upkeep.verify(root, set_aside=False)
    assert whole == len(found)
    assert not problems or not found, problems  # not even the identity could be written
    return found


def fill_up(base: Base, kind: str, mount: Path) -> list[int]:
    """How many segments each run left; the last one has room for all."""
    store, ballast = mount / "store", mount / "ballast"
    producer.fill(base, store, kind)
    expected = digests(store, kind)
    shutil.rmtree(store)
    counts = []
    for room in ROOM:
        disk = os.statvfs(mount)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - room * 1024)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            producer.fill(base, store, kind)
        ballast.unlink()
        left = digests(store, kind)
        assert left.items() <= expected.items()
        counts.append(len(left))
    producer.fill(base, store, kind)
    assert digests(store, kind) == expected
    shutil.rmtree(store)
    return [*counts, len(expected)]


def main() -> None:
    """Prints the counts of states and of answers."""
    base_folder, mount = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    base = base_model.load(Model(), base_folder, "digest", torch.device("cpu"), dtype="float32")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(mount)], check=True)
    try:
        print(json.dumps({kind: fill_up(base, kind, mount) for kind in ("states", "answers")}))
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


if __name__ == "__main__":
    main()

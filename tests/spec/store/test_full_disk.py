"""A disk that is really full: the error says so, nothing half-written is seen, and the same call goes on later."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.spec.store import full_disk, producer

MOUNTING = ["unshare", "--map-root-user", "--mount"]


@pytest.fixture(scope="module")
def mounting(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What lets a command mount a file system of its own, unseen by others."""
    mount = [*MOUNTING, "mount", "-t", "tmpfs", "none", str(tmp_path_factory.mktemp("mount"))]
    if not shutil.which("unshare") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a file system here (unshare --map-root-user --mount)")
    return MOUNTING


def test_a_full_disk_loses_nothing(mounting: list[str], base_folder: Path, tmp_path: Path) -> None:
    mount = tmp_path / "disk"
    mount.mkdir()
    command = [sys.executable, "-m", full_disk.__name__, base_folder, mount]
    root = Path(full_disk.__file__).parents[3]
    done = subprocess.run([*mounting, *map(str, command)], cwd=root, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for counts in json.loads(done.stdout).values():
        assert counts == sorted(counts)
        assert counts[0] == 0
        assert 0 < counts[-2] < counts[-1] == producer.COUNT
        assert len(set(counts)) > 3  # it filled up at several places

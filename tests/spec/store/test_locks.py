"""One holder at a time, and none that is dead."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from spec.errors import SpecError
from spec.store import locks
from spec.store.locks import Lock, alone, in_use
from tests.forked import forked

ROOT = Path(locks.__file__).parents[2]


def take(path: Path, wait: bool = False) -> Lock:
    lock = Lock.acquire(path, wait)
    assert lock is not None
    return lock


def waiting(path: Path) -> tuple[threading.Thread, list[Lock]]:
    """A thread that waits for the lock, and where it puts it."""
    got: list[Lock] = []
    thread = threading.Thread(target=lambda: got.append(take(path, wait=True)))
    thread.start()
    time.sleep(0.1)
    return thread, got


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = take(path)
    assert path.is_file()
    assert Lock.acquire(path) is None
    lock.release()
    assert not path.exists()
    other = take(path)
    lock.release()  # a second time, which takes nothing from the next holder
    assert Lock.acquire(path) is None
    other.release()


def test_children_of_a_killed_holder_do_not_keep_it(tmp_path: Path) -> None:
    """Workers start processes of their own, which may outlive them."""
    path, child = tmp_path / "lock", tmp_path / "child"

    def hold() -> Lock:
        lock = take(path)
        child.write_text(str(subprocess.Popen(["sleep", "60"]).pid))
        return lock

    with forked(hold) as kill:
        thread, got = waiting(path)
        try:
            assert not got
            kill()
            os.kill(int(child.read_text()), 0)  # it lives
            thread.join(1)
            got[0].release()
            assert not path.exists()
        finally:
            os.kill(int(child.read_text()), signal.SIGKILL)


def test_there_are_never_two_holders(tmp_path: Path) -> None:
    """Several processes take, release and remove one file as fast as they can; each of them must be alone inside."""
    script = """
import os, sys; from pathlib import Path; from spec.store.locks import Lock
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
count, inside = folder / 'count', folder / 'inside'
for _ in range(rounds):
    while (lock := Lock.acquire(folder / 'lock', wait=int(sys.argv[3]) > 0)) is None:
        pass
    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
    count.write_text(str(int(count.read_text()) + 1))
    inside.unlink()
    lock.release()
"""
    (tmp_path / "count").write_text("0")
    rounds, modes = 300, (1, 1, 1, 0)
    commands = [[sys.executable, "-c", script, str(tmp_path), str(rounds), str(mode)] for mode in modes]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait(60) for process in processes] == [0] * len(modes)
    assert int((tmp_path / "count").read_text()) == rounds * len(modes)
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_any_number_uses_a_store_and_nobody_is_alone_with_it_then(tmp_path: Path) -> None:
    root = tmp_path / "new" / "store"
    with in_use(root), in_use(root), pytest.raises(SpecError, match=r"in use by a running stage"), alone(root):
        pass
    with alone(root):
        with pytest.raises(SpecError, match=r"being cleaned by another process"), in_use(root):
            pass
        with pytest.raises(SpecError, match=r"in use"), alone(root):
            pass
    for use in (in_use, alone):
        with pytest.raises(ZeroDivisionError), use(root):
            raise ZeroDivisionError
    with alone(root):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(handle: int, kind: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(SpecError, match=rf"{tmp_path} is on a file system without file locks.*features\.store"):
        Lock.acquire(tmp_path / "lock")


def test_no_file_stays_open(tmp_path: Path) -> None:
    before = len(list(Path("/dev/fd").iterdir()))
    lock = take(tmp_path / "lock")
    for _ in range(5):
        assert Lock.acquire(tmp_path / "lock") is None
    lock.release()
    with in_use(tmp_path), pytest.raises(SpecError), alone(tmp_path):
        pass
    assert len(list(Path("/dev/fd").iterdir())) == before

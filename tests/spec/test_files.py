"""Atomic files, and digests that are computed once."""

import contextlib
import errno
import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spec import files
from spec.errors import SpecError
from tests.forked import run_killing

WHOLE = [False, True]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A memory of digests of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return files.cache_dir()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(b"first")
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def touch(path: Path, content: bytes, time: int) -> None:
    """Other content, at a given modification time."""
    path.write_bytes(content)
    os.utime(path, ns=(time, time))


def fill(path: Path, folder: bool, content: str) -> None:
    if folder:
        path.mkdir(exist_ok=True)
        (path / "deep").mkdir()
        (path / "deep" / "file").write_text(content)
    else:
        path.write_text(content)


def content_of(path: Path) -> str | None:
    file = path / "deep" / "file" if path.is_dir() else path
    return file.read_text() if file.exists() else None


@pytest.mark.parametrize("folder", WHOLE)
def test_it_has_the_permissions_that_the_user_gives_to_new_files(tmp_path: Path, folder: bool) -> None:
    before = os.umask(0o027)
    try:
        with files.whole(tmp_path / "deep" / "path", folder) as temporary:
            fill(temporary, folder, "new")
    finally:
        os.umask(before)
    assert (tmp_path / "deep" / "path").stat().st_mode & 0o777 == (0o750 if folder else 0o640)


STEPS = {
    "fsync": (os, "fsync", 1),
    "replace": (Path, "replace", 1),
    "rename": (Path, "rename", 1),
    "second rename": (Path, "rename", 2),
    "remove": (files.shutil, "rmtree", 1),
}


def write_until(step: str, stop: Callable[[], None], path: Path, folder: bool) -> None:
    """Write a path anew, and stop before this step, or within the block."""
    calls = 0
    owner, name, at = STEPS.get(step, (os, "fsync", 0))
    real = getattr(owner, name)

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            stop()
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stopping)
        with files.whole(path, folder) as temporary:
            fill(temporary, folder, "new")
            if step == "body":
                stop()


FAULTS = [
    *((folder, before, step) for folder in WHOLE for before in (None, "old") for step in ("body", "fsync")),
    *((False, before, "replace") for before in (None, "old")),
    (True, None, "replace"),
    *((True, "old", step) for step in ("rename", "second rename", "remove")),
]


@pytest.mark.parametrize(("folder", "before", "step"), FAULTS)
@pytest.mark.parametrize("error", [OSError(28, "no space"), KeyboardInterrupt()])
def test_a_fault_at_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, folder: bool, before: str | None, step: str, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    path = tmp_path / "path"
    if before is not None:
        fill(path, folder, before)
    with pytest.raises((OSError, KeyboardInterrupt, SpecError)):
        write_until(step, fail, path, folder)
    assert content_of(path) == ("new" if step == "remove" else before)
    with files.whole(path, folder) as temporary:
        assert not folder or not any(temporary.iterdir())
        assert temporary.parent == path.parent  # a rename within one file system
        fill(temporary, folder, "newer")
    assert content_of(path) == "newer"
    assert list(tmp_path.iterdir()) == [path]


def killed(body: Callable[[], object]) -> None:
    """Run what kills its own process in a child."""
    assert run_killing(body)["status"] == -signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("folder", "before", "step"), FAULTS)
def test_a_kill_at_any_step_leaves_the_old_or_the_new_and_what_is_left_goes(
    tmp_path: Path, folder: bool, before: str | None, step: str
) -> None:
    path = tmp_path / "path"
    if before is not None:
        fill(path, folder, before)
    killed(lambda: write_until(step, die, path, folder))
    expected = "new" if step == "remove" else before
    if step != "second rename":
        assert content_of(path) == expected
    with contextlib.suppress(InterruptedError), files.whole(path, folder):
        assert content_of(path) == expected  # what a kill left between two renames is back
        raise InterruptedError
    assert content_of(path) == expected
    assert list(tmp_path.iterdir()) == ([] if expected is None else [path])


@pytest.mark.parametrize("folder", WHOLE)
def test_all_is_on_the_disk_before_the_rename(tmp_path: Path, folder: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.add(os.fstat(handle).st_ino))
    replace = Path.replace

    def watched(path: Path, target: Path) -> Path:
        assert {part.stat().st_ino for part in [path, *path.rglob("*")]} <= flushed
        assert tmp_path.stat().st_ino not in flushed
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", watched)
    with files.whole(tmp_path / "path", folder) as temporary:
        fill(temporary, folder, "new")
    assert tmp_path.stat().st_ino in flushed  # and then its name


def left(name: str, suffix: str = ".partial") -> str:
    """The name of what a killed process of this machine has left."""
    return f".{name}-{files._HOST}-01234567{suffix}"


def test_what_killed_processes_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    fill(tmp_path / left("dead"), True, "half")
    fill(tmp_path / left("dead-file"), False, "half")
    others = {"mine.partial", ".mine.partial", ".dead-anotherhost-01234567.partial", ".mine.old"}
    for name in others:
        fill(tmp_path / name, False, "a user's own, or another machine's")
    with files.whole(tmp_path / "living", folder=True) as temporary, files.scratch(tmp_path, "workers") as scratch:
        fill(temporary, True, "half")
        files.sweep(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {temporary.name, scratch.name, *others}
    assert {path.name for path in tmp_path.iterdir()} == {"living", *others}


def test_a_scratch_folder_replaces_those_of_killed_processes(tmp_path: Path) -> None:
    def use() -> None:
        with files.scratch(tmp_path, "workers"):
            die()

    killed(use)
    fill(tmp_path / left("other"), True, "half")
    with files.scratch(tmp_path, "workers") as ours, files.scratch(tmp_path, "workers") as another:
        assert {path.name for path in tmp_path.iterdir()} == {left("other"), ours.name, another.name}
    assert {path.name for path in tmp_path.iterdir()} == {left("other")}


@pytest.mark.parametrize("folder", WHOLE)
@pytest.mark.parametrize("locks", [True, False])
def test_writers_of_one_path_do_not_disturb_each_other(
    tmp_path: Path, folder: bool, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not locks:  # as on some network file systems

        def refuse(handle: int, kind: int) -> None:
            raise OSError(errno.ENOLCK, "no locks")

        monkeypatch.setattr(files.fcntl, "flock", refuse)
    path = tmp_path / "path"
    with files.whole(path, folder) as first:
        fill(first, folder, "first")
        with files.whole(path, folder) as second:
            fill(second, folder, "second")
        assert content_of(path) == "second"
    assert content_of(path) == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", WHOLE)
@pytest.mark.parametrize("made", [True, False], ids=["made", "opened"])
def test_a_temporary_that_another_writer_sweeps_before_it_is_locked_is_made_again(
    tmp_path: Path, folder: bool, made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = Path if made else files.fcntl
    name = "flock" if not made else "mkdir" if folder else "touch"
    real = getattr(owner, name)

    def swept(path: Path | int, *args: Any, **kwargs: Any) -> None:
        if path == tmp_path:  # the parent
            return
        monkeypatch.setattr(owner, name, real)
        if made:
            real(path, *args, **kwargs)
        files.sweep(tmp_path)
        assert not any(tmp_path.iterdir())
        if not made:
            real(path, *args, **kwargs)

    monkeypatch.setattr(owner, name, swept)
    with files.whole(tmp_path / "path", folder) as temporary:
        files.sweep(tmp_path)
        assert list(tmp_path.iterdir()) == [temporary]  # it is locked
        fill(temporary, folder, "new")
    assert content_of(tmp_path / "path") == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "path"]


def test_nothing_is_moved_over_something(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError):
        files.move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_text() == "a"


def test_digest_of_json_does_not_depend_on_the_order_of_keys() -> None:
    assert files.digest_json({"a": 1, "b": [1, 2]}) == files.digest_json({"b": [1, 2], "a": 1})
    assert files.digest_json({"a": 1, "b": [1, 2]}) != files.digest_json({"a": 1, "b": [2, 1]})


@pytest.mark.parametrize(
    ("content", "later", "noticed"),
    [(b"FIRST", 1, True), (b"longer", 0, True), (b"FIRST", 0, False)],  # size or time tell
)
def test_a_changed_file_alone_is_read_again(cache: Path, data: Path, content: bytes, later: int, noticed: bool) -> None:
    files.digest_files([data])
    touch(data, content, data.stat().st_mtime_ns + later)
    assert files.digest_files([data])[str(data)] == sha256(content if noticed else b"first")


def test_a_link_that_points_elsewhere_is_noticed(cache: Path, data: Path, tmp_path: Path) -> None:
    """As a hub's cache lays out its snapshots."""
    other, link = tmp_path / "other", tmp_path / "link"
    touch(other, b"other", data.stat().st_mtime_ns)
    for target, content in ((data, b"first"), (other, b"other")):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert files.digest_files([link, other]) == {str(link): sha256(content), str(other): sha256(b"other")}


@pytest.mark.parametrize("content", [None, "{half", "[1]"])
def test_losing_the_memory_costs_only_time(cache: Path, data: Path, content: str | None) -> None:
    if content is None:
        cache.parent.write_text("in the way")  # it cannot be written, either
    else:
        files.write_json(cache / "digests.json", {})
        (cache / "digests.json").write_text(content)
    assert files.digest_files([data])[str(data)] == sha256(b"first")


def test_free_space_of_a_folder_yet_to_be_made(tmp_path: Path) -> None:
    assert files.free_bytes(tmp_path / "a" / "b") > 0

"""Atomic files, and digests that are computed once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec import files
from spec.errors import SpecError
from stages.common import child_environment


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A memory of digests of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return files.cache_dir()


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "data.bin"
    path.write_bytes(b"first")
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def touch(path: Path, content: bytes, time: int) -> None:
    """Other content, at a given modification time."""
    path.write_bytes(content)
    os.utime(path, ns=(time, time))


WHOLE = [False, True]


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
@pytest.mark.parametrize("before", [None, "old"])
def test_what_is_written_takes_its_place_when_it_is_whole(tmp_path: Path, before: str | None, folder: bool) -> None:
    path = tmp_path / "deep" / "path"
    if before is not None:
        path.parent.mkdir()
        fill(path, folder, before)
    with files.whole(path, folder) as temporary:
        fill(temporary, folder, "new")
        assert temporary.parent == path.parent  # a rename within one file system
        assert content_of(path) == before
    assert content_of(path) == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("folder", WHOLE)
def test_it_has_the_permissions_that_the_user_gives_to_new_files(tmp_path: Path, folder: bool) -> None:
    before = os.umask(0o027)
    try:
        with files.whole(tmp_path / "path", folder) as temporary:
            fill(temporary, folder, "new")
    finally:
        os.umask(before)
    assert (tmp_path / "path").stat().st_mode & 0o777 == (0o750 if folder else 0o640)


FAULTS = [
    *((folder, before, step) for folder in WHOLE for before in (None, "old") for step in ("body", "fsync")),
    *((False, before, "replace") for before in (None, "old")),
    (True, None, "replace"),
    *((True, "old", step) for step in ("rename", "second rename", "remove")),
]


@pytest.mark.parametrize(("folder", "before", "step"), FAULTS)
@pytest.mark.parametrize("error", [OSError(28, "no space"), KeyboardInterrupt()])
def test_a_fault_at_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, folder: bool, before: str | None, step: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "path"
    if before is not None:
        fill(path, folder, before)
    calls = 0

    def failing(real: Callable[..., Any], at: int = 1) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise error
            return real(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        if step == "fsync":
            patch.setattr(os, "fsync", failing(os.fsync))
        elif step in ("rename", "second rename"):
            patch.setattr(Path, "rename", failing(Path.rename, 2 if step == "second rename" else 1))
        elif step == "replace":
            patch.setattr(Path, "replace", failing(Path.replace))
        elif step == "remove":
            patch.setattr(files.shutil, "rmtree", failing(files.shutil.rmtree))
        with pytest.raises((OSError, KeyboardInterrupt, SpecError)), files.whole(path, folder) as temporary:  # noqa: PT012
            fill(temporary, folder, "new")
            if step == "body":
                raise error
    assert content_of(path) == ("new" if step == "remove" else before)
    with files.whole(path, folder) as temporary:
        assert not folder or not any(temporary.iterdir())
        fill(temporary, folder, "newer")
    assert content_of(path) == "newer"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from spec import files
from spec.errors import SpecError
from stages.common import child_environment
path, folder, step = Path(sys.argv[1]), sys.argv[2] == "True", sys.argv[3]
calls = 0
def dies(real, at):
    def run(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return run
if step == "fsync":
    os.fsync = dies(os.fsync, 1)
elif step == "rename":
    Path.rename = dies(Path.rename, 1)
elif step == "second rename":
    Path.rename = dies(Path.rename, 2)
with files.whole(path, folder) as temporary:
    if folder:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file").write_text("new")
    else:
        temporary.write_text("new")
    if step == "body":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("step", ["body", "fsync", "rename", "second rename"])
@pytest.mark.parametrize("folder", WHOLE)
def test_a_kill_at_any_step_leaves_the_old_or_the_new_and_what_is_left_goes(
    tmp_path: Path, folder: bool, step: str
) -> None:
    path = tmp_path / "path"
    fill(path, folder, "old")
    subprocess.run([sys.executable, "-c", KILLED, path, str(folder), step], env=child_environment(), check=False)
    if not (folder and step == "second rename"):
        assert content_of(path) in ("old", "new")
    with contextlib.suppress(InterruptedError), files.whole(path, folder):
        assert content_of(path) in ("old", "new")  # what a kill left between two renames is back
        raise InterruptedError
    assert content_of(path) in ("old", "new")
    assert list(tmp_path.iterdir()) == [path]


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
    fill(tmp_path / left("workers"), True, "half")
    fill(tmp_path / left("other"), True, "half")
    with files.scratch(tmp_path, "workers") as ours, files.scratch(tmp_path, "workers") as another:
        assert {path.name for path in tmp_path.iterdir()} == {left("other"), ours.name, another.name}
    assert {path.name for path in tmp_path.iterdir()} == {left("other")}


def test_the_scratch_folder_of_a_killed_process_goes_at_the_next_start(tmp_path: Path) -> None:
    body = "import os, signal; from pathlib import Path; from spec import files\n"
    body += f"with files.scratch(Path({str(tmp_path)!r}), 'workers'): os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", body], env=child_environment(), check=False)
    (killed,) = tmp_path.iterdir()
    with files.scratch(tmp_path, "workers") as ours:
        assert list(tmp_path.iterdir()) == [ours] != [killed]


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


def test_nothing_is_moved_over_something(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError):
        files.move(tmp_path / "a", tmp_path / "b")
    files.move(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "a"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=20)
@given(value=json_values)
def test_json_reads_back(value: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    files.write_json(path, value)
    assert files.read_json(path) == value


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_digest_of_json_does_not_depend_on_the_order_of_keys() -> None:
    assert files.digest_json({"a": 1, "b": [1, 2]}) == files.digest_json({"b": [1, 2], "a": 1})
    assert files.digest_json({"a": 1, "b": [1, 2]}) != files.digest_json({"a": 1, "b": [2, 1]})


def test_digests_are_sha256(cache: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"")
    assert files.digest_files([data, other]) == {str(data): sha256(b"first"), str(other): sha256(b"")}


def test_an_unchanged_file_is_not_read_again(cache: Path, data: Path) -> None:
    files.digest_files([data])
    time = data.stat().st_mtime_ns
    touch(data, b"FIRST", time)  # a change that neither size nor time tells
    assert files.digest_files([data])[str(data)] == sha256(b"first")


@pytest.mark.parametrize(("content", "later"), [(b"FIRST", 1), (b"longer", 0)])
def test_a_changed_file_is_noticed(cache: Path, data: Path, content: bytes, later: int) -> None:
    files.digest_files([data])
    touch(data, content, data.stat().st_mtime_ns + later)
    assert files.digest_files([data])[str(data)] == sha256(content)


def test_a_link_that_points_elsewhere_is_noticed(cache: Path, data: Path, tmp_path: Path) -> None:
    """As a hub's cache lays out its snapshots."""
    other, link = tmp_path / "other", tmp_path / "link"
    touch(other, b"other", data.stat().st_mtime_ns)
    link.symlink_to(data)
    assert files.digest_files([link]) == {str(link): sha256(b"first")}
    link.unlink()
    link.symlink_to(other)
    assert files.digest_files([link]) == {str(link): sha256(b"other")}


def test_losing_the_memory_costs_only_time(cache: Path, data: Path) -> None:
    files.digest_files([data])
    (memory,) = [path for path in cache.iterdir() if path.is_file()]
    memory.write_text("{half")
    assert files.digest_files([data])[str(data)] == sha256(b"first")
    memory.unlink()
    assert files.digest_files([data])[str(data)] == sha256(b"first")


def test_a_memory_of_another_shape_costs_only_time(cache: Path, data: Path) -> None:
    files.write_json(cache / "digests.json", [1])
    assert files.digest_files([data])[str(data)] == sha256(b"first")


def test_a_memory_that_cannot_be_written_costs_only_time(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in the way").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "in the way"))
    assert files.digest_files([data])[str(data)] == sha256(b"first")


def test_free_space_of_a_folder_yet_to_be_made(tmp_path: Path) -> None:
    assert files.free_bytes(tmp_path / "a" / "b") > 0

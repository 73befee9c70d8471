"""Atomic files, and digests that are computed once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec import files


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


@pytest.mark.parametrize("before", [None, "old"])
def test_replacing_is_whole(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "deep" / "file.txt"
    if before is not None:
        path.parent.mkdir()
        path.write_text(before)
    with files.replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent  # a rename within one file system
        assert (path.read_text() if path.exists() else None) == before
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_replacing_or_not_at_all(tmp_path: Path, before: str | None, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)

    def write() -> None:
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert (path.read_text() if path.exists() else None) == before
    assert list(tmp_path.iterdir()) == ([path] if before else [])


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

"""One segment: what is written is what is read, and nothing else is ever taken for it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spec.store import segment
from spec.store.segment import StoreError

HOST = socket.gethostname()
NAME = "0123456789abcdef0123456789abcdef"


def make_arrays(rows: int = 1500, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Arrays of every dtype that the store holds; two chunks each at 1500 rows."""
    generator = np.random.default_rng(seed)
    return {
        "states": generator.integers(0, 2**16, (rows, 3), np.uint16),
        "exact": generator.standard_normal((rows, 2)).astype(np.float32),
        "ids": generator.integers(0, 50_000, rows, np.int32),
        "mask": generator.integers(0, 2, rows, np.uint8),
        "offsets": np.arange(rows, dtype=np.int64),
    }


def assert_equal(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> None:
    assert list(found) == list(expected)
    for key, array in expected.items():
        assert found[key].dtype == array.dtype
        np.testing.assert_array_equal(found[key], array, strict=True)


@pytest.fixture(scope="module", params=["none", "zstd"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segment to be damaged and mended again."""
    folder = tmp_path_factory.mktemp("segments")
    segment.write(folder, NAME, ["a", "b"], make_arrays(), {"dtype": "bfloat16"}, request.param)
    return folder


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("rows", [0, 1, 1023, 1024, 1025, 3000])
def test_what_is_written_is_read(tmp_path: Path, codec: str, rows: int) -> None:
    arrays = make_arrays(rows)
    segment.write(tmp_path, NAME, ["a"], arrays, {}, codec)
    assert_equal(segment.read(tmp_path, NAME), arrays)


def test_zeros_are_stored_like_anything_else(tmp_path: Path) -> None:
    arrays = {"states": np.zeros((1100, 4), np.uint16)}
    segment.write(tmp_path, NAME, [], arrays, {}, "none")
    assert_equal(segment.read(tmp_path, NAME), arrays)
    assert sum(path.stat().st_size for path in (tmp_path / NAME / "states" / "c").rglob("*")) > 1100 * 8


def test_any_zarr_reads_it(written: Path) -> None:
    group = zarr.open_group(written / NAME, mode="r")
    assert group.attrs["dtype"] == "bfloat16"
    for key, array in make_arrays().items():
        np.testing.assert_array_equal(np.asarray(group[key]), array)


def test_the_record(written: Path) -> None:
    record = segment.read_record(written, NAME)
    files = [path for path in (written / NAME).rglob("*") if path.is_file() and path.name != segment.RECORD]
    assert record == segment.Record(
        NAME, ("a", "b"), segment.content_digest(make_arrays()), sum(path.stat().st_size for path in files)
    )


def test_the_digest_does_not_depend_on_the_codec(tmp_path: Path) -> None:
    records = [segment.write(tmp_path / codec, NAME, [], make_arrays(), {}, codec) for codec in ("none", "zstd")]
    assert records[0].digest == records[1].digest
    assert records[0].bytes != records[1].bytes


def test_the_digest_holds_names_dtypes_shapes_and_values() -> None:
    array = np.arange(6, dtype=np.int32)
    digests = {
        segment.content_digest(arrays)
        for arrays in (
            {"a": array},
            {"b": array},
            {"a": array.astype(np.uint32)},
            {"a": array.reshape(2, 3)},
            {"a": array[::-1]},
            {"a": array, "b": array[:0]},
        )
    }
    assert len(digests) == 6
    pair = {"a": array, "b": array + 1}
    assert segment.content_digest(pair) == segment.content_digest(dict(reversed(pair.items())))
    columns = np.asfortranarray(np.arange(6).reshape(2, 3))
    assert segment.content_digest({"a": columns}) == segment.content_digest({"a": columns.copy(order="C")})


def chunks(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / NAME).glob("*/c/**/*") if path.is_file())


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_damage_to_chunks_is_noticed(written: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(chunks(written)))
    content = path.read_bytes()
    places = st.integers(0, len(content) - 1)
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "drop", "zero"]))
    at = data.draw(places)
    if kind == "flip":
        damaged = content[:at] + bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))]) + content[at + 1 :]
    elif kind == "cut":
        damaged = content[: max(at, 1)]
    elif kind == "grow":
        damaged = content + data.draw(st.binary(min_size=1, max_size=8))
    elif kind == "drop":
        damaged = content[:at] + content[at + 1 :]
    else:
        damaged = bytes(len(content))
    try:
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=rf"segment {NAME} in .*{written.name}.* damaged.*delete its folder"):
            segment.read(written, NAME)
    finally:
        path.write_bytes(content)
    assert_equal(segment.read(written, NAME), make_arrays())


def test_a_folder_of_chunks_that_is_gone_is_noticed(written: Path, tmp_path: Path) -> None:
    for key, array in make_arrays().items():
        copy = shutil.copytree(written, tmp_path / key)
        shutil.rmtree(copy / NAME / key / "c")
        assert array.size
        with pytest.raises(StoreError, match=NAME):
            segment.read(copy, NAME)


@pytest.mark.parametrize("loss", ["removed", "emptied"])
@pytest.mark.parametrize("key", ["states", "ids"])
def test_a_shard_that_is_gone_is_noticed(written: Path, tmp_path: Path, key: str, loss: str) -> None:
    copy = shutil.copytree(written, tmp_path / "copy")
    (path,) = (path for path in chunks(copy) if path.is_relative_to(copy / NAME / key))
    if loss == "removed":
        path.unlink()
    else:
        path.write_bytes(b"")
    with pytest.raises(StoreError, match=NAME):
        segment.read(copy, NAME)


def test_damage_to_metadata_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    arrays = {"ids": np.arange(1, 1501, dtype=np.int32)}
    segment.write(tmp_path, NAME, [], arrays, {}, "none")
    path = tmp_path / NAME / "ids" / "zarr.json"
    content = path.read_bytes()
    shape = content.index(b"1500")
    for at in range(shape, shape + 4):
        for bit in range(4):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            try:
                found = segment.read(tmp_path, NAME)
            except StoreError:
                continue
            assert_equal(found, arrays)


@pytest.mark.parametrize("lost", ["ids", "ids/zarr.json", "zarr.json", ""])
def test_missing_parts_are_named(written: Path, tmp_path: Path, lost: str) -> None:
    copy = shutil.copytree(written, tmp_path / "copy")
    path = copy / NAME / lost
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(StoreError, match=rf"segment {NAME} .*missing or damaged"):
        segment.read(copy, NAME)


@pytest.mark.parametrize("content", ["", '{"items": [', "{}"])
def test_a_damaged_record_is_named(written: Path, tmp_path: Path, content: str) -> None:
    copy = shutil.copytree(written, tmp_path / "copy")
    (copy / NAME / segment.RECORD).write_text(content)
    with pytest.raises(StoreError, match=NAME):
        segment.read_record(copy, NAME)


@pytest.mark.parametrize("step", ["create_group", "_flush", "write_json"])
def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    owner = {"create_group": segment.zarr, "_flush": segment, "write_json": segment.files}[step]
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, fail)
        with pytest.raises(OSError, match="no space left"):
            segment.write(tmp_path, NAME, ["a"], make_arrays(3), {}, "none")
    assert list(tmp_path.iterdir()) == []
    segment.write(tmp_path, NAME, ["a"], make_arrays(3), {}, "none")
    assert_equal(segment.read(tmp_path, NAME), make_arrays(3))


def test_a_segment_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the rename nothing has its name; at the rename all of it is there."""
    rename = Path.rename

    def watched(path: Path, target: Path) -> Path:
        assert not target.exists()
        assert (path / segment.RECORD).is_file()
        assert_equal(segment.read(path.parent, path.name), make_arrays(3))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    segment.write(tmp_path, NAME, ["a"], make_arrays(3), {}, "none")
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.add(os.fstat(handle).st_ino))
    rename = Path.rename

    def watched(path: Path, target: Path) -> Path:
        assert {part.stat().st_ino for part in [path, *path.rglob("*")]} <= flushed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    segment.write(tmp_path, NAME, ["a"], make_arrays(3), {}, "none")
    assert (tmp_path / NAME).is_dir()


def test_a_segment_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    segment.write(tmp_path, NAME, ["a"], make_arrays(3), {}, "none")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert segment.write(tmp_path, NAME, ["a"], make_arrays(3), {}, "zstd").name == NAME
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_segment_without_its_record_is_replaced(tmp_path: Path) -> None:
    segment.write(tmp_path, NAME, ["a"], make_arrays(3), {}, "none")
    (tmp_path / NAME / segment.RECORD).unlink()
    segment.write(tmp_path, NAME, ["a"], make_arrays(3), {}, "none")
    assert segment.read_record(tmp_path, NAME).items == ("a",)


def litter(folder: Path, owner: str) -> Path:
    path = folder / f".partial-{owner}-{NAME}"
    path.mkdir()
    (path / "zarr.json").write_text("{")
    return path


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_litter_of_dead_processes_is_cleaned_and_of_living_ones_kept(tmp_path: Path, dead: int) -> None:
    gone = litter(tmp_path, f"{HOST}-{dead}")
    kept = [litter(tmp_path, owner) for owner in (f"{HOST}-{os.getppid()}", f"{HOST}-1", f"elsewhere-{dead}")]
    segment.write(tmp_path, NAME, ["a"], make_arrays(3), {}, "none")
    segment.clean_litter(tmp_path)
    assert not gone.exists()
    assert all(path.exists() for path in kept)
    assert_equal(segment.read(tmp_path, NAME), make_arrays(3))


def test_litter_of_a_host_whose_name_begins_like_this_one_is_kept(tmp_path: Path, dead: int) -> None:
    kept = [litter(tmp_path, f"{HOST}-{dead}-{os.getpid()}"), litter(tmp_path, f"{HOST}-gpu-{dead}")]
    segment.clean_litter(tmp_path)
    assert all(path.exists() for path in kept)


def test_a_killed_writer_leaves_no_segment(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; import numpy as np; from spec.store import segment\n"
        "segment._flush = lambda folder: os.kill(os.getpid(), 9)\n"
        f"segment.write(Path(sys.argv[1]), '{NAME}', ['a'], {{'ids': np.arange(9)}}, {{}}, 'none')\n"
    )
    root = Path(segment.__file__).parents[2]
    status = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root).returncode
    assert status == -9
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".partial")
    assert json.loads((partial / segment.RECORD).read_text())["items"] == ["a"]  # as late as a kill can come
    segment.clean_litter(tmp_path)
    assert list(tmp_path.iterdir()) == []

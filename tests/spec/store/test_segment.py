"""One segment: what is written is what is read, and nothing else is ever taken for it."""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec.store import segment, shards
from spec.store.codecs import CODECS
from spec.store.collection import Collection
from spec.store.segment import DamagedError, Record, Row
from tests.tiny import anew

NAME = "0123456789abcdef0123456789abcdef"
OFFSETS = dict.fromkeys(("states", "exact"), "state_offsets") | dict.fromkeys(("ids", "mask"), "token_offsets")
OFFSETS["wide"] = "wide_offsets"
ATTRIBUTES = {"dtype": "bfloat16", "offsets": OFFSETS}
SMALL_CHUNKS = 96


def make_rows(lengths: Sequence[int] = (7, 40, 0, 90), seed: int = 0) -> list[Row]:
    """Rows with arrays of every dtype that the store holds."""
    generator = np.random.default_rng(seed)
    return [
        {
            "states": generator.integers(0, 2**16, (length // 2, 3), np.uint16),
            "exact": generator.standard_normal((length // 2, 2)).astype(np.float32),
            "ids": generator.integers(0, 50_000, length, np.int32),
            "mask": generator.integers(0, 2, length, np.uint8),
            "wide": generator.integers(0, 2**60, length + 1, np.int64),
        }
        for length in lengths
    ]


def keys(rows: Sequence[Row]) -> list[str]:
    return [f"key {number}" for number in range(len(rows))]


def write(folder: Path, rows: Sequence[Row], codec: str = "none", **attributes: Any) -> Record:
    return segment.write(folder, NAME, keys(rows), rows, {**ATTRIBUTES, **attributes}, CODECS[codec])


def read(folder: Path) -> list[Row]:
    return segment.rows_of(*segment.read(folder, NAME))


def assert_equal(found: Sequence[Row], expected: Sequence[Row]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert set(one) == set(other)
        for key, array in other.items():
            assert one[key].dtype == array.dtype
            np.testing.assert_array_equal(one[key], array, strict=True)


@settings(max_examples=30)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 23, 24, 25, 47, 48, 49, 96, 97]), min_size=1, max_size=4),
    chunk=st.sampled_from([1, SMALL_CHUNKS, 2**20]),
    codec=st.sampled_from(["none", "zstd"]),
    seed=st.integers(0, 9),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], chunk: int, codec: str, seed: int
) -> None:
    folder, rows = tmp_path_factory.mktemp("segment"), make_rows(lengths, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_CHUNK_BYTES", chunk)
        record = write(folder, rows, codec)
    assert_equal(read(folder), rows)
    assert segment.read_record(folder, NAME) == record
    assert (record.name, record.items) == (NAME, tuple(keys(rows)))
    assert record.digests == tuple(map(segment.digest_row, rows))  # whatever the codec, the chunks and the company
    paths = [path for path in (folder / NAME).rglob("*") if path.is_file() and path.name != segment.RECORD]
    sizes = {path.relative_to(folder / NAME).as_posix(): path.stat().st_size for path in paths}
    assert ({name: size for name, (size, _) in record.files.items()}, record.size) == (sizes, sum(sizes.values()))
    assert all((digest is not None) == name.endswith("zarr.json") for name, (_, digest) in record.files.items())
    arrays, attributes = segment.read(folder, NAME)
    segment.check_rows(folder, record, arrays, attributes)
    whole = [name for name in arrays if name not in OFFSETS]
    assert sorted(whole) == ["state_offsets", "token_offsets", "wide_offsets"]
    assert all(arrays[name].dtype == np.int64 for name in whole)


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    rows = make_rows()
    write(tmp_path, rows)
    arrays, attributes = segment.read(tmp_path, NAME, only=("ids", "token_offsets"))
    assert sorted(arrays) == ["ids", "token_offsets"]
    np.testing.assert_array_equal(arrays["ids"], np.concatenate([row["ids"] for row in rows]))
    nothing, same = segment.read(tmp_path, NAME, only=())
    assert nothing == {}
    assert same == attributes
    assert attributes["dtype"] == "bfloat16"


def test_arrays_that_share_offsets_have_the_same_lengths(tmp_path: Path) -> None:
    rows = make_rows()
    rows[1] = {**rows[1], "mask": rows[1]["mask"][1:]}
    with pytest.raises(ValueError, match=r"mask does not share .*token_offsets"):
        write(tmp_path, rows)
    assert list(tmp_path.iterdir()) == []


def test_the_digest_of_a_segment_follows_keys_rows_and_order() -> None:
    def digest(items: str, digests: str) -> str:
        return Record("name", tuple(items), tuple(digests), {}).digest

    found = [digest("ab", "xy"), digest("ba", "xy"), digest("ab", "yx"), digest("ac", "xy"), digest("a", "x")]
    assert len(set(found)) == len(found)
    assert Record("other", ("a",), ("x",), {"f": (1, None)}).digest == digest("a", "x")


def test_the_digest_of_a_row_holds_names_dtypes_shapes_and_values() -> None:
    array = np.arange(6, dtype=np.int32)
    others = (array.astype(np.uint32), array.reshape(2, 3), array[::-1])
    rows = [{"a": array}, {"b": array}, *({"a": each} for each in others), {"a": array, "b": array[:0]}]
    assert len(set(map(segment.digest_row, rows))) == len(rows)
    pair = {"a": array, "b": array + 1}
    assert segment.digest_row(pair) == segment.digest_row(dict(reversed(pair.items())))
    columns = np.asfortranarray(np.arange(6).reshape(2, 3))
    assert segment.digest_row({"a": columns}) == segment.digest_row({"a": columns.copy(order="C")})


@pytest.fixture(scope="module", params=["none", "zstd"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    """A collection of one segment, to be damaged and written again."""
    rows = make_rows()
    collection = Collection(tmp_path_factory.mktemp("store"), "features", {"base": "w"})
    collection.create()
    claim = collection.claim(keys(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_CHUNK_BYTES", SMALL_CHUNKS)
        claim.commit(rows, ATTRIBUTES, CODECS[request.param])
    yield collection
    assert_whole(collection)


def segment_of(collection: Collection) -> Path:
    return collection.folder / collection.name_of(keys(make_rows()))


def assert_whole(collection: Collection) -> None:
    name = segment_of(collection).name
    fresh = anew(collection)
    assert fresh.verify(name).items == tuple(keys(make_rows()))
    assert_equal(segment.rows_of(*fresh.read(name)), make_rows())


def assert_noticed(collection: Collection, remembers: Collection) -> None:
    """By everyone who reads: by verify, and by a reader, which looks at the record and then at the arrays."""
    name = segment_of(collection).name
    message = rf"segment {name} in {collection.folder} is missing or damaged \("

    for look in (collection.verify, remembers.verify, lambda name: (collection.record(name), collection.read(name))):
        with pytest.raises(DamagedError, match=message) as caught:
            look(name)
        assert caught.value.name == name


@settings(max_examples=150)
@given(data=st.data())
def test_any_damage_to_any_file_is_noticed(whole: Collection, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(path for path in segment_of(whole).rglob("*") if path.is_file())))
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    changed, more = data.draw(st.integers(1, 255)), data.draw(st.binary(min_size=1, max_size=8))
    kinds = [
        content[:at] + bytes([content[at] ^ changed]) + content[at + 1 :],
        content[:at],
        content + more,
        content[:at] + content[at + 1 :],
        content[:at] + more + content[at:],
        bytes(len(content)),
        content[at:] + content[:at],
    ]
    wrong = data.draw(st.sampled_from(kinds))
    if wrong == content:  # as a turn of equal bytes is
        return
    remembers = anew(whole)
    remembers.record(segment_of(whole).name)
    path.write_bytes(wrong)
    try:
        assert_noticed(anew(whole), remembers)
    finally:
        path.write_bytes(content)


def test_anything_that_is_gone_is_noticed(whole: Collection, tmp_path: Path) -> None:
    remembers = anew(whole)
    remembers.record(segment_of(whole).name)
    for path in [segment_of(whole), *segment_of(whole).rglob("*")]:
        path.rename(tmp_path / "gone")
        try:
            assert_noticed(anew(whole), remembers)
        finally:
            (tmp_path / "gone").rename(path)


@pytest.mark.parametrize("content", [b"", b'{"items": [', b"{}", b"[]", b"null", b"\xff\xfe", b'{"format": 1}'])
def test_what_is_no_record_is_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / segment.RECORD).write_bytes(content)
    with pytest.raises(DamagedError, match=NAME):
        segment.read_record(tmp_path, NAME)


def test_stray_files_do_no_harm(whole: Collection) -> None:
    folder = segment_of(whole)
    strays = [folder / ".DS_Store", folder / "ids" / "c" / "9"]
    for path in strays:
        path.write_bytes(b"{stray")
    assert_whole(whole)
    assert whole.survey()[1] == {}
    for path in strays:
        path.unlink()


def test_a_whole_segment_under_another_name_is_damage(whole: Collection) -> None:
    """Such as a folder that was copied or renamed by hand."""
    other = whole.folder / NAME
    shutil.copytree(segment_of(whole), other)
    with pytest.raises(DamagedError, match=rf"segment {NAME} .*other rows than its name stands for"):
        anew(whole).verify(NAME)
    assert list(anew(whole).survey()[1]) == [NAME]
    shutil.rmtree(other)


def test_a_segment_of_another_identity_is_damage(whole: Collection, tmp_path: Path) -> None:
    name = segment_of(whole).name
    other = Collection(tmp_path, whole.kind, {"base": "v"})
    other.create()
    shutil.copytree(segment_of(whole), other.folder / name)
    for look in (other.read, other.verify):
        with pytest.raises(DamagedError, match=rf"identity is {whole.digest}, expected {other.digest}|other rows"):
            look(name)


def test_rows_that_are_not_those_of_the_record_are_named(tmp_path: Path) -> None:
    """As after a fault that left every checksum of a file right."""
    rows = make_rows()
    record = write(tmp_path, rows)
    arrays, attributes = segment.read(tmp_path, NAME)
    segment.check_rows(tmp_path, record, arrays, attributes)
    ids = arrays["ids"].copy()
    ids[[0, -1]] += 1
    with pytest.raises(DamagedError, match=rf"segment {NAME} .*rows \[0, 3\] have another content"):
        segment.check_rows(tmp_path, record, {**arrays, "ids": ids}, attributes)
    with pytest.raises(DamagedError, match=NAME):
        segment.check_rows(tmp_path, record, arrays, {**attributes, "offsets": {"lost": "lost_offsets"}})


def test_a_writer_whose_disk_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, *_: object) -> None:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write", half)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, make_rows())
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, make_rows())
    assert_equal(read(tmp_path), make_rows())


def test_a_segment_without_its_record_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, make_rows())
    (tmp_path / NAME / segment.RECORD).unlink()
    write(tmp_path, make_rows())
    assert segment.read_record(tmp_path, NAME).items == tuple(keys(make_rows()))
    assert_equal(read(tmp_path), make_rows())


def test_names_are_those_of_segments_alone(tmp_path: Path) -> None:
    write(tmp_path, make_rows((3,)))
    (tmp_path / ".x-machine-01234567.partial").mkdir()
    (tmp_path / ".damaged-x").mkdir()
    (tmp_path / "identity.json").write_text("{}")
    assert list(segment.names(tmp_path)) == [NAME]
    assert list(segment.names(tmp_path / "nowhere")) == []

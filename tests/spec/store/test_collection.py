"""What is there, what is damaged, and who computes what is missing."""

import json
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spec import files
from spec.store import segment
from spec.store.codecs import CODECS, NONE
from spec.store.collection import Claim, Collection, Writer, collections, share_out
from spec.store.segment import Record, Row, StoreError
from tests.forked import forked
from tests.tiny import anew

IDENTITY = {"base": "w", "dtype": "bfloat16", "norm": "after the final norm", "seed": None}
ATTRIBUTES = {"offsets": {"ids": "token_offsets"}}
GROUPS = [[f"{number}", f"{number}+"] for number in range(13)]


def collection(root: Path, **changed: Any) -> Collection:
    made = Collection(root, "features", IDENTITY | changed)
    made.create()
    return made


def row(item: str) -> Row:
    return {"ids": np.asarray([ord(letter) for letter in item], np.int32)}


def claim(made: Collection, items: Sequence[str]) -> Claim:
    claimed = made.claim(items)
    assert claimed is not None
    return claimed


def commit(made: Collection, items: Sequence[str], codec: str = "none", **attributes: Any) -> Record:
    return claim(made, items).commit([row(item) for item in items], {**ATTRIBUTES, **attributes}, CODECS[codec])


def test_a_worker_that_does_not_see_the_stages_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"features-[0-9a-f]{16} is not here, .*the same features.store"):
        next(share_out([[(Collection(tmp_path, "features", IDENTITY), ["a"])]], 1, 2))


@pytest.mark.parametrize("changed", [{"base": "v"}, {"extra": 1}])
def test_another_identity_is_another_folder(tmp_path: Path, changed: dict[str, Any]) -> None:
    one, other = collection(tmp_path), collection(tmp_path, **changed)
    commit(one, ["k"])
    assert other.find() == {}
    names = [one.name_of(items) for items in (["k", "l"], ["l", "k"], ["k"], ["kl"])] + [other.name_of(["k", "l"])]
    for each in (names, [one.folder, other.folder, Collection(tmp_path, "answers", IDENTITY).folder]):
        assert len(set(each)) == len(each)
    path = one.folder / "identity.json"
    assert IDENTITY.items() <= files.read_json(path).items()
    before = path.stat().st_mtime_ns
    one.create()
    assert path.stat().st_mtime_ns == before  # it is written once


def test_later_segments_are_seen_old_records_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, other = collection(tmp_path), collection(tmp_path)
    commit(made, ["a"])
    assert set(other.find()) == {"a"}
    read = []
    real = segment.read_record
    monkeypatch.setattr(segment, "read_record", lambda folder, name: read.append(name) or real(folder, name))
    record = commit(made, ["b"])
    assert set(other.find()) == {"a", "b"}
    assert read == [record.name]


@pytest.mark.parametrize("content", [b"", b"\xff", json.dumps({"format": 3, **IDENTITY}).encode()])
def test_an_identity_that_nobody_wrote_is_damage(tmp_path: Path, content: bytes) -> None:
    """The last one has equal values in another spelling."""
    made = collection(tmp_path)
    (made.folder / "identity.json").write_bytes(content)
    for look in (made.check, made.create):
        with pytest.raises(StoreError, match=r"identity\.json is damaged: remove it and run the stage again"):
            look()
    (made.folder / "identity.json").unlink()
    made.create()
    assert files.read_json(made.folder / "identity.json")["base"] == "w"


def test_a_collection_opens_from_its_folder_and_from_no_other(tmp_path: Path) -> None:
    made = collection(tmp_path)
    commit(made, ["a"])
    assert Collection.open(made.folder) == made
    assert Collection.open(made.folder).find() == made.find()
    assert list(collections(tmp_path)) == [made.folder]
    assert list(collections(tmp_path / "nowhere")) == []
    path = made.folder / "identity.json"
    content = path.read_bytes()
    renamed = tmp_path / "features-0123456789abcdef"
    shutil.copytree(made.folder, renamed)
    (tmp_path / "empty").mkdir()
    for folder in (renamed, tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(StoreError, match=rf"{folder} is no collection"):
            Collection.open(folder)
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(StoreError, match=rf"{made.folder} is no collection"):
            Collection.open(made.folder)
    path.write_bytes(content.replace(b'"format": 3', b'"format": 2'))
    with pytest.raises(StoreError, match="its format is 2, this version reads 3"):
        Collection.open(made.folder)


def test_a_survey_names_what_is_damaged(tmp_path: Path) -> None:
    made = collection(tmp_path)
    records = [commit(made, [item]) for item in "abcde"]
    paths = [made.folder / record.name for record in records]
    (paths[0] / segment.RECORD).unlink()
    (paths[1] / "ids" / "c" / "0").write_bytes(b"short")
    (paths[2] / "ids" / "zarr.json").unlink()
    record = paths[3] / segment.RECORD
    record.write_text(record.read_text().replace('"d"', '"e"'))  # one bit apart
    good, damaged = anew(made).survey()
    assert good == anew(made).records() == {records[4].name: records[4]}
    assert set(damaged) == {record.name for record in records[:4]}
    assert "ids/c/0 is 5 bytes long, not" in damaged[records[1].name].reason
    assert set(anew(made).find()) == {"e"}
    assert not made.holds(["a"])


def test_a_segment_set_aside_is_computed_again(tmp_path: Path) -> None:
    made = collection(tmp_path)
    record = commit(made, ["a", "b"])
    (made.folder / record.name / "ids" / "c" / "0").write_bytes(b"short")
    assert made.claim(["a", "b"]) is None  # as long as it is there
    target = made.set_aside(record.name)
    assert target.is_dir()
    assert target.name == f".damaged-{record.name}"
    assert made.find() == {}
    assert commit(made, ["a", "b"]) == record
    assert made.verify(record.name) == record
    made.set_aside(record.name)  # again, over the one from before
    assert not made.holds(["a", "b"])


def test_cleaning_takes_what_the_dead_left_and_nothing_of_the_living(tmp_path: Path) -> None:
    made = collection(tmp_path)
    record = commit(made, ["kept"])

    def half(item: str, machine: str) -> Path:
        return made.folder / f".{made.name_of([item])}-{machine}-01234567.partial"

    def begin() -> None:
        claim(made, ["a"])
        (half("a", "here") / "ids").mkdir(parents=True)

    left = {half("a", "here").name, f".lock-{made.name_of(['a'])}"}
    always = {"identity.json", record.name}
    with forked(begin) as kill:
        anew(made).create()
        assert {path.name for path in made.folder.iterdir()} == always | left
        kill()
        anew(made).create()
        assert {path.name for path in made.folder.iterdir()} == always
    half("b", "another").mkdir()  # its lock is gone
    made.create()
    assert {path.name for path in made.folder.iterdir()} == always
    assert made.verify(record.name) == record


def work(made: Collection, rank: int, world: int, done: list[int], pause: float = 0.0) -> None:
    for index, (claimed,) in share_out([[(made, group)] for group in GROUPS], rank, world):
        time.sleep(pause)
        claimed.commit(map(row, GROUPS[index]), ATTRIBUTES, NONE)
        done.append(index)


def together(root: Path, ranks: Sequence[int], world: int) -> list[list[int]]:
    """What each of several workers did; every one has a collection of its own, as a process has."""
    done: list[list[int]] = [[] for _ in ranks]
    threads = [
        threading.Thread(target=work, args=(collection(root), rank, world, mine, 0.002))
        for rank, mine in zip(ranks, done, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return done


@pytest.mark.parametrize(
    ("ranks", "world"), [([0], 1), ([0, 1], 2), ([0, 1, 2, 3], 4), ([0, 0, 0], 1), ([0, 1], 4), ([5, 9], 2), ([2], 3)]
)
def test_workers_do_each_group_once(tmp_path: Path, ranks: list[int], world: int) -> None:
    """Wrong ranks, too, only cost time."""
    done = together(tmp_path, ranks, world)
    assert sorted(index for mine in done for index in mine) == list(range(len(GROUPS)))
    if ranks == list(range(world)):
        for rank, mine in enumerate(done):
            own = [index for index in mine if index % world == rank]
            assert own == mine[: len(own)] == sorted(own)  # its own share first, in order
    found = collection(tmp_path)
    assert all(map(found.holds, GROUPS))
    assert list(found.folder.glob(".lock-*")) == []


def test_the_groups_of_a_dead_worker_are_taken_over(tmp_path: Path) -> None:
    made = collection(tmp_path)
    begun = (1, 4)
    with forked(lambda: [claim(made, GROUPS[index]) for index in begun]) as kill:
        done: list[int] = []
        worker = threading.Thread(target=work, args=(anew(made), 0, 2, done))
        worker.start()
        deadline = time.monotonic() + 10
        while len(done) < len(GROUPS) - len(begun) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert sorted(done) == [index for index in range(len(GROUPS)) if index not in begun]
        assert worker.is_alive()  # it waits: the other one may yet commit them
        kill()
        worker.join(10)
        assert not worker.is_alive()
    assert sorted(done) == list(range(len(GROUPS)))
    assert sorted(done[-len(begun) :]) == list(begun)


def test_a_group_comes_with_claims_to_those_of_its_segments_that_are_missing(tmp_path: Path) -> None:
    """In the order of the folders' names, whatever the group's own; none while another process computes one of them."""
    stores = [collection(tmp_path, layer=layer) for layer in range(3)]
    ordered = sorted(stores, key=lambda made: made.folder)
    group = [(made, ["a", "b"]) for made in stores]
    commit(ordered[1], ["a", "b"])
    held = claim(ordered[2], ["a", "b"])
    found: list[list[Collection]] = []

    def one() -> None:
        for _, claims in share_out([group], 0, 1):
            found.append([each.collection for each in claims])
            for each in claims:
                each.commit([row("a"), row("b")], ATTRIBUTES, NONE)

    worker = threading.Thread(target=one)
    worker.start()
    time.sleep(0.05)
    assert found == []  # it waits
    held.release()
    worker.join(10)
    assert found == [[ordered[0], ordered[2]]]
    assert all(made.holds(["a", "b"]) for made in stores)


def write(writer: Writer, claimed: Claim, rows: Iterable[Row]) -> None:
    writer.write([claimed], partial(claimed.commit, rows, ATTRIBUTES, NONE))


@pytest.mark.parametrize("count", [1, 13])  # it is noticed when the block ends, or when more is written
def test_a_writer_that_has_failed_says_why_takes_no_more_and_keeps_no_claim(tmp_path: Path, count: int) -> None:
    stores, begun = [collection(tmp_path, layer=layer) for layer in range(2)], []

    def full() -> None:
        raise OSError("the disk is full")

    def produce() -> None:
        with Writer() as writer:
            for index, claims in share_out([[(made, group) for made in stores] for group in GROUPS[:count]], 0, 1):
                begun.append(index)
                writer.write(claims, full)

    with pytest.raises(OSError, match="the disk is full"):
        produce()
    assert len(begun) <= 3
    for made in stores:
        for group in GROUPS:
            claim(made, group).release()
        assert made.find() == {}


def test_an_error_outside_keeps_only_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, go, started = collection(tmp_path), threading.Event(), threading.Event()
    real = segment.write

    def slow(*arguments: Any) -> Record:
        started.set()
        go.wait(10)
        return real(*arguments)

    def fail() -> None:
        with Writer() as writer:
            for item in "ab":
                write(writer, claim(made, [item]), [row(item)])
            started.wait(10)
            threading.Timer(0.05, go.set).start()
            raise ZeroDivisionError

    monkeypatch.setattr(segment, "write", slow)
    with pytest.raises(ZeroDivisionError):
        fail()
    assert set(made.find()) == {"a"}
    claim(made, ["b"]).release()


def test_the_writer_holds_at_most_two_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    started: list[Sequence[str]] = []

    def slow(folder: Path, name: str, items: Sequence[str], *_: object) -> None:
        started.append(items)
        go.wait(10)

    monkeypatch.setattr(segment, "write", slow)
    accepted: list[int] = []
    made = collection(tmp_path)

    def produce() -> None:
        with Writer() as writer:
            for value in range(4):
                write(writer, claim(made, [str(value)]), [row("a")])
                accepted.append(value)

    producer = threading.Thread(target=produce)
    producer.start()
    time.sleep(0.2)
    assert (accepted, started) == ([0, 1], [("0",)])
    go.set()
    producer.join(10)
    assert (accepted, started) == ([0, 1, 2, 3], [("0",), ("1",), ("2",), ("3",)])

"""Copies of a store: what is copied, what is refused, and what a kill at any moment leaves."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.registry import known_implementations

pytest.importorskip("s3fs", reason="needs what `pip install '.[dev]'` installs")
pytest.importorskip("moto.server", reason="needs what `pip install '.[dev]'` installs")

from spec.store import segment, transfer, upkeep
from spec.store.locks import Lock
from spec.store.manifest import Manifest
from spec.store.reader import FeatureReader
from spec.store.segment import StoreError
from spec.store.transfer import Place, Transfer, TransferError
from tests import s3
from tests.spec.store import copier, producer
from tests.tiny import chain, store_features

ROWS = chain(24, 997)

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3.server() as url, pytest.MonkeyPatch.context() as patch:
        s3.use(patch, url)
        yield url


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place that holds nothing yet."""
    if request.param == "folder":
        return str(tmp_path / "copy")
    client = s3.client(request.getfixturevalue("server"))
    bucket = f"bucket-{abs(hash(tmp_path)) % 10**9}"
    client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}/some/where"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store."""
    return tmp_path / "store"


@pytest.fixture
def made(root: Path) -> Manifest:
    """What it holds."""
    return store_features(root, ROWS)


@pytest.fixture(scope="module")
def run(server: str) -> Iterator[Run]:
    """Lets another process copy, as copier.run does."""
    with producer.serving(copier.__name__) as task:
        yield task


def copy(source: Path | str, target: Path | str, only: dict[str, list[str]] | None = None) -> Transfer:
    work = Transfer(Place(source), Place(target), only)
    work.copy(work.look())
    return work


def content(at: Path | str) -> dict[str, bytes]:
    """Every file that is visible at a place: those of segments with a record, and identities."""
    place = Place(at)
    found = {path.removeprefix(f"{place._path}/"): path for path in place._fs.find(place._path)}
    visible = {name.removesuffix(segment.RECORD) for name in found if re.fullmatch(r"[^/]+/[^./]+/record.json", name)}
    kept = [name for name in found if name.endswith("/identity.json") or any(map(name.startswith, visible))]
    return {name: place._fs.cat_file(found[name]) for name in kept}


def put(place: str, name: str, data: bytes) -> None:
    """Write a file at a place."""
    Place(place)._fs.pipe_file(f"{Place(place)._path}/{name}", data)


def segment_names(place: Path | str) -> set[str]:
    return {name.rpartition("/")[2] for name in segments_of(content(place))}


def test_there_and_back(root: Path, made: Manifest, url: str, tmp_path: Path) -> None:
    work, seen = Transfer(Place(root), Place(url)), list[int]()
    lacking = work.look()
    work.copy(lacking, seen.append)
    assert (work.copied, work.problems) == (len(made.last.segments), [])
    identity = (made.last.collection(root).folder / "identity.json").read_bytes()
    everything = sum(map(len, content(root).values()))
    assert sum(seen) == sum(item.size for item in lacking) == everything - len(identity)
    assert content(url) == content(root)
    assert copy(root, url).copied == 0
    second = tmp_path / "second"
    assert copy(url, second).copied == len(made.last.segments)
    assert content(second) == content(root)
    assert upkeep.verify(second, set_aside=False) == (len(made.last.segments), [])
    FeatureReader(made, second)
    assert copy(url, second).copied == 0


def test_only_what_is_named_is_copied(root: Path, made: Manifest, url: str, tmp_path: Path) -> None:
    folder = made.last.collection(root).folder.name
    assert copy(root, url, {folder: made.last.segments[:2]}).copied == 2
    assert segment_names(url) == set(made.last.segments[:2])
    work = copy(url, tmp_path / "second", {folder: made.last.segments[1:3]})
    assert segment_names(tmp_path / "second") == {made.last.segments[1]}
    (problem,) = work.problems
    assert made.last.segments[2] in str(problem)
    assert "is missing or damaged" in str(problem)


@pytest.mark.parametrize("what", ["states", "truncated", "missing", "record", "outside"])
def test_damage_is_named_and_the_rest_copied(root: Path, made: Manifest, url: str, tmp_path: Path, what: str) -> None:
    copy(root, url)
    name, folder = made.last.segments[1], made.last.collection(root).folder.name
    where = f"{folder}/{name}/" + {"record": segment.RECORD, "outside": segment.RECORD}.get(what, "states/c/0/0")
    data = content(url)[where]
    if what == "outside":
        record = json.loads(data)
        record["files"]["../out"] = record["files"].pop("zarr.json")
        data = json.dumps(record).encode()
    changed = {"states": data[:-99] + bytes([data[-99] ^ 1]) + data[-98:], "truncated": data[:-1]}
    for place in (url, str(root)):
        if what == "missing":
            Place(place)._fs.rm_file(f"{Place(place)._path}/{where}")
        else:
            put(place, where, changed.get(what, data[: len(data) // (1 if what == "outside" else 2)]))
    for source, target in ((url, tmp_path / "pulled"), (root, f"{url}/pushed")):
        work = copy(source, target)
        assert work.copied == len(made.last.segments) - 1
        assert segment_names(target) == set(made.last.segments) - {name}
        (problem,) = work.problems
        assert name in str(problem)
        assert "is missing or damaged" in str(problem)
    assert not list(tmp_path.rglob("out"))


def test_a_damaged_record_at_the_target_is_replaced(root: Path, made: Manifest, url: str) -> None:
    copy(root, url)
    where = f"{made.last.collection(root).folder.name}/{made.last.segments[0]}/{segment.RECORD}"
    put(url, where, b"{}")
    assert copy(root, url).copied == 1
    assert content(url) == content(root)


def test_the_identities_must_agree(root: Path, made: Manifest, url: str, tmp_path: Path) -> None:
    copy(root, url)
    where = f"{made.last.collection(root).folder.name}/identity.json"
    for damaged in (b"{}", b"", content(url)[where].replace(b"float32", b"float16")):
        put(url, where, damaged)
        store_features(root, chain(3, 99))
        pushed, pulled = copy(root, url), copy(url, tmp_path / "pulled")
        assert (pushed.copied, pulled.copied) == (0, 0)
        assert f"{where} differs from that of" in str(pushed.problems[0])
        assert "is no collection of segments" in str(pulled.problems[0])
    put(url, where, b'{"format": 1}')  # of another version: nothing that this one could use
    assert copy(url, tmp_path / "pulled").problems == []
    assert segment_names(tmp_path / "pulled") == set()


def test_places_that_cannot_be_used(root: Path, made: Manifest, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=r"is the store itself"):
        copy(root, f"file://{root}")
    with pytest.raises(StoreError, match=r"nonsense://x cannot be used .*expected is a folder or a URL"):
        Place("nonsense://x")
    with pytest.raises(TransferError, match=r"could not write .*bucket does not exist.*run the same command again"):
        copy(root, "s3://nowhere/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(TransferError, match=r"could not read .*check the address"):
        copy(root, "s3://nowhere/x")
    absent = {"class": "absent.FileSystem", "err": "please install absent"}
    monkeypatch.setitem(known_implementations, "absent", absent)
    with pytest.raises(StoreError, match=r"please install absent.*\(for s3://, pip install '\.\[s3\]'\)"):
        Place("absent://x")


@pytest.mark.parametrize("place", ["source", "target"])
def test_an_unreachable_place_is_no_damage(
    root: Path, made: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Or `follow` would never try these segments again."""
    work, real = Transfer(Place(root), Place(tmp_path / "copy")), Place.read

    def read(self: Place, name: str) -> bytes | None:
        failing = name.endswith(segment.RECORD) and self is getattr(work, place)
        return _raise(TransferError("the network is down")) if failing else real(self, name)

    monkeypatch.setattr(Place, "read", read)
    with pytest.raises(TransferError, match="the network is down"):
        work.look()


def test_follow_copies_what_comes_and_outlives_a_failure(root: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PAUSE", 0.05)
    real, failures = Transfer.look, [TransferError("the network is down")]
    monkeypatch.setattr(Transfer, "look", lambda self: real(self) if not failures else _raise(failures.pop()))
    work, stopping = Transfer(Place(root), Place(url)), threading.Event()
    thread = threading.Thread(target=work.follow, args=(stopping, lambda left: None, lambda count: None))
    thread.start()
    for count in (4, 12, 24):
        made = store_features(root, ROWS[:count])
        deadline = threading.Event()
        while not set(made.last.segments) <= segment_names(url):
            assert thread.is_alive()
            deadline.wait(0.05)
    store_features(root, chain(30, 500, seed=1))
    stopping.set()
    thread.join()
    assert content(url) == content(root)
    assert work.problems == []


def _raise(error: Exception) -> Any:
    raise error


def test_another_process_that_writes_the_segment_is_waited_for(root: Path, made: Manifest, tmp_path: Path) -> None:
    second = tmp_path / "second"
    copy(root, second, {made.last.collection(root).folder.name: made.last.segments[1:]})
    lock = Lock.acquire(made.last.collection(second).folder / f".lock-{made.last.segments[0]}")
    thread = threading.Thread(target=copy, args=(root, second))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert made.last.segments[0] not in segment_names(second)
    lock.release()
    thread.join()
    assert content(second) == content(root)


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_a_kill_at_any_step(root: Path, url: str, tmp_path: Path, run: Run, direction: str) -> None:
    """Whatever is visible then is whole, and the same copy completes it. (Every third step on S3, which is slow.)"""
    store_features(root, ROWS[:9])
    expected, source = content(root), str(root)
    if direction == "pull":
        copy(root, url)
        source = url
    partly = 0
    for step in range(0, 1000, 3 if "s3://" in url else 1):
        target = f"{url}/{step}" if direction == "push" else str(tmp_path / f"pulled-{step}")
        status = run(source=source, target=target, step=step)["status"]
        visible = content(target)
        assert_whole(visible, expected)
        if status == 0:
            break
        assert status == -9
        partly += 0 < len(segments_of(visible)) < len(segments_of(expected))
        assert run(source=source, target=target)["status"] == 0
        assert content(target) == expected
    assert visible == expected
    assert partly >= 3


def segments_of(visible: dict[str, bytes]) -> set[str]:
    return {name.rpartition("/")[0] for name in visible if name.endswith(segment.RECORD)}


def assert_whole(visible: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """Each visible segment has every byte that it should have."""
    assert visible.items() <= expected.items()
    for name in segments_of(visible):
        assert {path for path in expected if path.startswith(name)} == {p for p in visible if p.startswith(name)}

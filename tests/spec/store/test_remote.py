"""A store on S3, against a server process: what machines share, what a kill or a cut line leaves, what is forgotten."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("boto3", reason="needs what `pip install '.[dev]'` installs")
pytest.importorskip("moto.server", reason="needs what `pip install '.[dev]'` installs")

from spec.corpus import TokenSequence
from spec.errors import SpecError
from spec.store import remote, segment, upkeep
from spec.store.bucket import RemoteError
from spec.store.locks import in_use
from spec.store.manifest import Manifest
from spec.store.plan import item_key
from spec.store.reader import FeatureReader
from spec.store.remote import Mirror
from spec.store.segment import StoreError
from tests import s3
from tests.tiny import chain, states_of, store_features

ROWS = chain(24, 997)
KEYS = [item_key(row.ids, row.mask) for row in ROWS]
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3.server() as url:
        yield url


@dataclasses.dataclass
class Cloud:
    """A bucket, and machines that use it."""

    client: Any
    bucket: str
    patch: pytest.MonkeyPatch
    folder: Path

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/some/where"

    def machine(self, name: str) -> Mirror:
        """Let this process be a machine, with a cache folder of its own."""
        self.patch.setenv("XDG_CACHE_HOME", str(self.folder / name))
        return Mirror(self.url)

    def objects(self) -> dict[str, bytes]:
        found = self.client.list_objects_v2(Bucket=self.bucket).get("Contents", ())
        return {o["Key"].removeprefix("some/where/"): self.get(o["Key"]) for o in found}

    def get(self, key: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return content

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"some/where/{name}", Body=content)

    def tars(self) -> list[str]:
        return sorted(name for name in self.objects() if name.endswith(".tar"))


@pytest.fixture
def cloud(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cloud:
    s3.use(monkeypatch, server)
    bucket = f"bucket-{abs(hash(tmp_path)) % 10**9}"
    client = s3.client(server)
    client.create_bucket(Bucket=bucket)
    return Cloud(client, bucket, monkeypatch, tmp_path)


def never(row: TokenSequence) -> Any:
    raise AssertionError("computed again")


def filled(mirror: Mirror, **options: Any) -> Manifest:
    """Compute ROWS on this machine, and upload them."""
    with mirror.uploading(True):
        return store_features(mirror.root, ROWS, **options)


def local(mirror: Mirror, manifest: Manifest) -> set[str]:
    return set(segment.names(manifest.collection(mirror.root).folder))


def test_a_second_machine_computes_nothing(cloud: Cloud) -> None:
    first = cloud.machine("first")
    made = filled(first)
    assert [name.rpartition("/")[2] for name in cloud.tars()] == sorted(f"{name}.tar" for name in made.segments)

    second = cloud.machine("second")
    assert second.root != first.root
    collection = made.collection(second.root)
    assert second.keys(collection) == set(KEYS)
    assert not collection.folder.exists()
    collection.create()
    second.fetch(collection, KEYS)
    with second.uploading(True):
        again = store_features(second.root, ROWS, states=never)
    assert dataclasses.asdict(again) == dataclasses.asdict(made)
    assert again.digest == made.digest
    readers = FeatureReader(made, first.root), FeatureReader(again, second.root)
    pairs = zip(*(reader.sequences(range(24)) for reader in readers), strict=True)
    assert all((a.states == b.states).all() for (_, a), (_, b) in pairs)


def test_an_object_is_a_tar_of_the_segment(cloud: Cloud) -> None:
    mirror = cloud.machine("a")
    made = filled(mirror)
    folder = made.collection(mirror.root).folder
    for name in made.segments:
        with tarfile.open(fileobj=BytesIO(cloud.objects()[f"{folder.name}/{name}.tar"])) as tar:
            assert tar.getnames()[0] == segment.RECORD
            found = {member.name: tar.extractfile(member) for member in tar}
            content = {path: file.read() for path, file in found.items() if file is not None}
        paths = [p for p in (folder / name).rglob("*") if p.is_file() and p.name != remote.UPLOADED]
        assert content == {str(path.relative_to(folder / name)): path.read_bytes() for path in paths}
    assert cloud.objects()[f"{folder.name}/identity.json"] == (folder / "identity.json").read_bytes()


def test_progress_ends_at_its_total(cloud: Cloud) -> None:
    seen: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def counting(total: int, label: str) -> Iterator[Callable[[int], object]]:
        done: list[int] = []
        yield done.append
        seen[label.partition(" ")[0]] = [sum(done), total]

    mirror = cloud.machine("a")
    made = store_features(mirror.root, ROWS)
    mirror.connect()
    mirror.push(counting)
    cloud.machine("b")
    other = Mirror(cloud.url, counting)
    other.fetch_segments(made.collection(other.root), made.segments)
    total = sum(len(cloud.objects()[name]) for name in cloud.tars())
    assert seen == {"upload": [total, total], "download": [total, total]}


def test_only_what_is_needed_is_downloaded(cloud: Cloud) -> None:
    made = filled(cloud.machine("a"))
    needed = made.segment[0]
    mirror = cloud.machine("b")
    collection = made.collection(mirror.root)
    collection.create()
    mirror.fetch(collection, KEYS[:1])
    assert local(mirror, made) == {made.segments[needed]}
    mirror.fetch_segments(collection, made.segments[:3])
    assert local(mirror, made) == {made.segments[needed], *made.segments[:3]}


def test_a_record_longer_than_the_first_look(cloud: Cloud) -> None:
    rows = chain(1000, 500)
    mirror = cloud.machine("a")
    with mirror.uploading(True):
        made = store_features(mirror.root, rows, segment_tokens=10**9)
    record = made.collection(mirror.root).folder / made.segments[0] / segment.RECORD
    assert record.stat().st_size > remote.HEAD
    other = cloud.machine("b")
    assert other.keys(made.collection(other.root)) == {item_key(row.ids, row.mask) for row in rows}


def test_what_is_here_needs_no_network(cloud: Cloud, server: str) -> None:
    line = s3.Line(server)
    cloud.patch.setenv("AWS_ENDPOINT_URL", line.url)
    mirror = cloud.machine("a")
    made = filled(mirror)
    line.cut()
    mirror = cloud.machine("a")
    mirror.fetch_segments(made.collection(mirror.root), made.segments)
    with pytest.raises(RemoteError, match="is the network up"):
        mirror.fetch_segments(made.collection(mirror.root), ["0" * 32])


def test_where_no_row_is_wanted_no_segment_is_looked_into(cloud: Cloud) -> None:
    made = filled(cloud.machine("a"))
    mirror = cloud.machine("b")
    collection = made.collection(mirror.root)
    collection.create()
    mirror.fetch(collection, KEYS[:1])
    cloud.patch.setattr(Mirror, "_record", lambda *_: pytest.fail("looked into a segment"))
    mirror.fetch(collection, KEYS[:1])


def test_the_same_rows_with_other_bits(cloud: Cloud) -> None:
    """Two machines that compute the same segment: what the bucket has first is what both have at the end."""
    first, second = cloud.machine("first"), cloud.machine("second")
    made = filled(first)
    with second.uploading(True):
        store_features(second.root, ROWS, states=lambda row: states_of(row) + 1, codec="zstd")
    again = store_features(second.root, ROWS, states=never)
    assert again == made
    FeatureReader(made, second.root)


def test_a_kill_in_the_middle_of_an_upload(cloud: Cloud) -> None:
    script = f"""
import os
import time
from contextlib import contextmanager
from spec.store.remote import Mirror
from tests.tiny import chain, states_of, store_features

@contextmanager
def halting(total, label):
    sent = 0
    def count(more):
        nonlocal sent
        sent += more
        if sent > 12e6:
            os.write(1, b"in the middle\\n")  # several threads upload, each line is one write
            time.sleep(600)
    yield count

mirror = Mirror({cloud.url!r})
mirror.connect()
store_features(mirror.root, chain(200, 997), segment_tokens=10**9, states=lambda row: states_of(row, 4096))
mirror.push(halting)
"""
    mirror = cloud.machine("a")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle\n"
        process.send_signal(signal.SIGKILL)
    (folder,) = (path for path in mirror.root.glob("features-*"))
    assert set(cloud.objects()) == {"store.json", f"{folder.name}/identity.json"}
    other = cloud.machine("b")
    assert all(summary.segments == 0 for summary in other.summaries())

    mirror = cloud.machine("a")  # the next run
    with mirror.uploading(False):
        pass
    (name,) = segment.names(folder)
    assert cloud.tars() == [f"{folder.name}/{name}.tar"]
    assert other.verify(True) == (1, [])
    uploads = cloud.client.list_multipart_uploads(Bucket=cloud.bucket)
    assert len(uploads["Uploads"]) == 1
    mirror.forget("t", [], [np.asarray([1, 2, 3], np.int32)])
    assert "Uploads" not in cloud.client.list_multipart_uploads(Bucket=cloud.bucket)


def test_a_cut_line(cloud: Cloud, server: str) -> None:
    line = s3.Line(server)
    cloud.patch.setenv("AWS_ENDPOINT_URL", line.url)
    mirror = cloud.machine("a")
    message = r"could not .*is the network up.*kept in .*the next run uploads it"

    def run() -> None:
        with mirror.uploading(True):
            store_features(mirror.root, ROWS)
            line.cut()

    with pytest.raises(RemoteError, match=message):
        run()
    assert cloud.tars() == []
    with pytest.raises(RemoteError, match=r"could not read store\.json"):
        cloud.machine("a").connect()
    line.mend()
    mirror = cloud.machine("a")
    with mirror.uploading(False):
        made = store_features(mirror.root, ROWS, states=never)
    assert len(cloud.tars()) == len(made.segments)
    line.cut()


def test_segments_travel_while_others_are_computed(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.05)
    mirror = cloud.machine("a")
    with mirror.uploading(True):
        store_features(mirror.root, ROWS[:4])
        deadline = time.monotonic() + 60
        while not cloud.tars():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_run_that_fails_is_gone_on_with(cloud: Cloud) -> None:
    mirror = cloud.machine("a")
    made = store_features(mirror.root, ROWS)
    with pytest.raises(KeyboardInterrupt), mirror.uploading(True):
        raise KeyboardInterrupt
    assert cloud.tars() == []
    with mirror.uploading(False):
        pass
    assert len(cloud.tars()) == len(made.segments)


def test_no_bucket(cloud: Cloud) -> None:
    with pytest.raises(RemoteError, match=r"s3://nowhere/x: could not read store\.json: there is no such bucket"):
        Mirror("s3://nowhere/x").connect()


def test_no_credentials(cloud: Cloud) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        cloud.patch.delenv(name)
    with pytest.raises(RemoteError, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
        cloud.machine("a").connect()


def test_wrong_credentials(cloud: Cloud) -> None:
    with s3.server({"INITIAL_NO_AUTH_ACTION_COUNT": "1"}) as strict:
        s3.client(strict).create_bucket(Bucket=cloud.bucket)
        cloud.patch.setenv("AWS_ENDPOINT_URL", strict)
        with pytest.raises(RemoteError, match="the server does not know the access key; check AWS_ACCESS_KEY_ID"):
            cloud.machine("a").connect()


def test_no_boto3(cloud: Cloud) -> None:
    cloud.patch.setitem(sys.modules, "boto3", None)
    with pytest.raises(RemoteError, match=r"needs boto3 .*: pip install '\.\[s3\]'"):
        cloud.machine("a").connect()


def test_a_bad_server_address(cloud: Cloud) -> None:
    cloud.patch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(RemoteError, match="check AWS_ENDPOINT_URL"):
        cloud.machine("a").connect()


def test_a_store_that_was_emptied(cloud: Cloud) -> None:
    mirror = cloud.machine("a")
    made = filled(mirror)
    for name in cloud.objects():
        cloud.client.delete_object(Bucket=cloud.bucket, Key=f"some/where/{name}")
    mirror = cloud.machine("a")
    with pytest.raises(StoreError, match="was emptied or made anew"):
        mirror.connect()
    assert local(mirror, made) == set(made.segments)
    (mirror.root / remote.LOCAL_STORE).unlink()
    with mirror.uploading(False):
        pass
    assert len(cloud.tars()) == len(made.segments)


def damage(cloud: Cloud, name: str, where: float = 0.6) -> None:
    """Change one byte of the states of a segment in the bucket."""
    content = bytearray(cloud.objects()[name])
    with tarfile.open(fileobj=BytesIO(bytes(content))) as tar:
        member = tar.getmember("states/c/0/0")
    content[member.offset_data + int(member.size * where)] ^= 1
    cloud.put(name, bytes(content))


def test_a_damaged_object_is_noticed(cloud: Cloud) -> None:
    made = filled(cloud.machine("a"))
    name = cloud.tars()[0]
    stem = name.rpartition("/")[2].removesuffix(".tar")
    damage(cloud, name)
    mirror = cloud.machine("b")
    collection = made.collection(mirror.root)

    with pytest.raises(StoreError, match=f"segment {stem} in .* is damaged .*run the cache stage"):
        mirror.fetch_segments(collection, made.segments)
    assert stem not in local(mirror, made)
    whole, (problem,) = mirror.verify(set_aside=False)
    assert whole == len(made.segments) - 1
    assert stem in str(problem)
    assert name in cloud.tars()

    collection.create()
    mirror.fetch(collection, KEYS)  # as the cache stage does
    assert local(mirror, made) == set(made.segments) - {stem}
    assert name not in cloud.tars()
    with mirror.uploading(True):
        again = store_features(mirror.root, ROWS)
    assert again.digest == made.digest
    third = cloud.machine("c")
    third.fetch_segments(again.collection(third.root), again.segments)
    FeatureReader(again, third.root)


@pytest.mark.parametrize("content", [b"", b"x", bytes(4096)])
def test_an_object_that_is_no_segment(cloud: Cloud, content: bytes) -> None:
    made = filled(cloud.machine("a"))
    name = cloud.tars()[0]
    cloud.put(name, content)
    mirror = cloud.machine("b")
    collection = made.collection(mirror.root)
    collection.create()
    mirror.fetch(collection, KEYS)
    assert len(local(mirror, made)) == len(made.segments) - 1
    assert name not in cloud.tars()


def test_verify_mends_the_bucket_from_a_whole_copy(cloud: Cloud) -> None:
    mirror = cloud.machine("a")
    made = filled(mirror)
    before = cloud.objects()
    damage(cloud, cloud.tars()[0])
    assert len(mirror.verify(set_aside=True)[1]) == 1
    assert mirror.verify(set_aside=True) == (len(made.segments), [])
    assert {name: cloud.objects()[name] for name in before} == before


def traces(cloud: Cloud, row: TokenSequence) -> list[str]:
    """Where, in any version of any object and on any machine, the row's tokens or key are."""
    needles = row.ids.tobytes(), item_key(row.ids, row.mask).encode()
    found = []
    for entry in cloud.client.list_object_versions(Bucket=cloud.bucket).get("Versions", ()):
        part = {"Bucket": cloud.bucket, "Key": entry["Key"], "VersionId": entry["VersionId"]}
        content = cloud.client.get_object(**part)["Body"].read()
        found += [entry["Key"] for needle in needles if needle in content]
    paths = [path for path in cloud.folder.rglob("*") if path.is_file()]
    return found + [str(path) for path in paths for needle in needles if needle in path.read_bytes()]


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("where", ["the machine that computed", "another machine"])
def test_forget(cloud: Cloud, versioned: bool, where: str) -> None:
    if versioned:
        enabled = {"Status": "Enabled"}
        cloud.client.put_bucket_versioning(Bucket=cloud.bucket, VersioningConfiguration=enabled)
    first = cloud.machine("first")
    made = filled(first)
    old = next(name for name in cloud.tars() if made.segments[made.segment[0]] in name)
    cloud.put(old, cloud.objects()[old])  # a second version
    cloud.put(old.replace("/", "/.damaged-"), cloud.objects()[old])
    assert len(traces(cloud, ROWS[0])) >= 4

    mirror = first if where == "the machine that computed" else cloud.machine("second")
    removal = mirror.forget("t", [], [ROWS[0].ids])
    assert removal.rows == 1
    if where == "another machine":
        assert local(mirror, made).isdisjoint(made.segments), "it kept what it had no need of"
        machine = cloud.machine("first")
        assert traces(cloud, ROWS[0])
        machine.connect()  # its next run
        machine.push()
    assert traces(cloud, ROWS[0]) == []

    last = cloud.machine("last")
    collection = made.collection(last.root)
    collection.create()
    last.fetch(collection, KEYS)
    assert collection.find().keys() == set(KEYS[1:])
    assert store_features(last.root, ROWS[1:], states=never).content == store_features(first.root, ROWS[1:]).content


def test_a_collection_that_is_new_here_brings_nothing_forgotten_back(cloud: Cloud) -> None:
    """A machine that meets another's collection still knows which of its own segments the bucket had."""
    first = cloud.machine("first")
    filled(first)
    second = cloud.machine("second")
    filled(second, dtype="bfloat16")
    first = cloud.machine("first")
    first.verify(set_aside=False)  # meets the second machine's collection
    cloud.machine("second").forget("t", [], [ROWS[0].ids])
    first = cloud.machine("first")
    with first.uploading(False):  # its next run
        pass
    assert traces(cloud, ROWS[0]) == []


def test_forget_leaves_other_tokenizers_alone(cloud: Cloud) -> None:
    filled(cloud.machine("a"))
    before = cloud.objects()
    assert cloud.machine("b").forget("another", [], [ROWS[0].ids]).rows == 0
    assert cloud.objects() == before


def test_forget_refuses_what_it_cannot_read(cloud: Cloud) -> None:
    filled(cloud.machine("a"))
    name = cloud.tars()[0]
    damage(cloud, name)
    before = cloud.objects()
    mirror = cloud.machine("b")
    with pytest.raises(StoreError, match=r"cannot be read .*nothing was removed"):
        mirror.forget("t", [], [row.ids for row in ROWS])
    assert cloud.objects() == before
    mirror.verify(set_aside=True)
    mirror.forget("t", [], [row.ids for row in ROWS])
    assert cloud.tars() == []


def test_what_others_removed_is_removed_here_when_nobody_reads_it(cloud: Cloud) -> None:
    mirror = cloud.machine("a")
    made = filled(mirror)
    name = cloud.tars()[0]
    stem = name.rpartition("/")[2].removesuffix(".tar")
    cloud.client.delete_object(Bucket=cloud.bucket, Key=f"some/where/{name}")
    with in_use(mirror.root):
        with (again := cloud.machine("a")).uploading(False):
            pass
        assert stem in local(again, made)
    assert name not in cloud.tars()
    cloud.machine("a").connect()
    assert stem not in local(mirror, made)


def test_gc(cloud: Cloud) -> None:
    first = cloud.machine("first")
    made = filled(first)
    part = store_features(first.root, ROWS[:3], states=never)
    manifest = cloud.folder / "train.json"
    part.save(manifest)
    folder = made.collection(first.root).folder
    upkeep.add_root(first.root, manifest, {folder.name: part.segments})
    first.push_roots()
    kept = {f"{folder.name}/{name}.tar" for name in part.segments}
    everything = set(cloud.tars())
    assert kept < everything
    second = cloud.machine("second")
    real = time.time

    def later(days: float) -> None:
        cloud.patch.setattr(time, "time", lambda: real() + days * remote.DAY)

    later(6)
    there, _ = second.gc(7 * remote.DAY, True)
    assert (there.segments, there.kept) == (0, len(everything))
    later(8)
    there, _ = second.gc(7 * remote.DAY, False)
    assert there.segments == len(everything - kept)
    assert set(cloud.tars()) == everything
    there, _ = second.gc(7 * remote.DAY, True)
    assert there.segments == len(everything - kept)
    assert set(cloud.tars()) == kept

    manifest.unlink()
    second.gc(7 * remote.DAY, True)
    assert set(cloud.objects()) == {"store.json", "writable"}


def test_a_manifest_of_another_machine_counts_for_days(cloud: Cloud) -> None:
    first = cloud.machine("first")
    made = filled(first)
    manifest = cloud.folder / "train.json"
    made.save(manifest)
    upkeep.add_root(first.root, manifest, {made.collection(first.root).folder.name: made.segments})
    first.push_roots()
    manifest.unlink()  # it is not on the machine that cleans
    second = cloud.machine("second")
    before = cloud.tars()
    second.gc(60, True)
    assert cloud.tars() == before
    second.gc(0, True)
    assert cloud.tars() == []


def test_what_is_none_of_the_stores_is_left_alone(cloud: Cloud) -> None:
    """Such as the marker of a folder that was made in a console."""
    made = filled(cloud.machine("first"))
    folder = made.collection(Path()).folder.name
    others = {f"roots/{name}": b"" for name in ("", "notes.txt", "deep/er.json")}
    others |= {f"{folder}/{name}": b"" for name in ("", f"deep/{'0' * 32}.tar")}
    for name, content in others.items():
        cloud.put(name, content)
    before = cloud.objects()
    second = cloud.machine("second")
    assert second.verify(set_aside=True) == (len(made.segments), [])
    second.gc(60, True)
    assert cloud.objects() == before
    assert not (second.root / upkeep.ROOTS).exists()


def test_summaries(cloud: Cloud) -> None:
    mirror = cloud.machine("a")
    made = filled(mirror)
    (summary,) = mirror.summaries()
    assert (summary.segments, summary.cached) == (len(made.segments), len(made.segments))
    assert summary.bytes == sum(len(cloud.objects()[name]) for name in cloud.tars())
    second = cloud.machine("b")
    (other,) = second.summaries()
    assert (other.segments, other.cached) == (len(made.segments), 0)
    assert second.missing(made.collection(second.root), [*made.segments, "0" * 32]) == ["0" * 32]
    assert mirror.missing(made.collection(mirror.root), made.segments[:1]) == made.segments[:1], "damaged here"


def test_a_full_disk(cloud: Cloud) -> None:
    made = filled(cloud.machine("a"))
    mirror = cloud.machine("b")
    cloud.patch.setattr(remote.files, "free_bytes", lambda path: 10)
    with pytest.raises(SpecError, match="XDG_CACHE_HOME"):
        mirror.fetch_segments(made.collection(mirror.root), made.segments)


def test_folders_of_servers_and_prefixes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    folders = [remote.local_folder(url) for url in ("s3://one", "s3://one/a", "s3://one/b", "s3://two/a")]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9000")
    folders.append(remote.local_folder("s3://one"))
    assert len(set(folders)) == len(folders)
    assert remote.local_folder("s3://one/a/") == remote.local_folder("s3://one/a")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("../out", tarfile.REGTYPE), ("a/../../out", tarfile.REGTYPE), ("/out", tarfile.REGTYPE), ("a", tarfile.SYMTYPE)],
)
def test_a_tar_writes_nothing_outside_its_folder(tmp_path: Path, name: str, kind: bytes) -> None:
    folder, packed = tmp_path / "folder", BytesIO()
    folder.mkdir()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member, BytesIO())
    packed.seek(0)
    with tarfile.open(fileobj=packed) as tar, pytest.raises(ValueError, match="no plain file of a segment"):
        remote._extract(tar, folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]

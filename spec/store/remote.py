"""A store on S3: the pipeline works on a local folder, and a Mirror keeps it in step with the bucket.

    s3://BUCKET/PREFIX/
      store.json                      which store this is
      writable                        empty; written by a stage before it computes, to see that it may write
      roots/NAME.json                 as in a local store
      COLLECTION/identity.json        as in a local store
      COLLECTION/SEGMENT.tar          the segment's files, record.json first

A segment is one object, so it is there whole or not at all, and whoever writes it last leaves one segment of one
writer. Its rows follow from its name. The bucket decides: a local copy that was in the bucket and is there no more
(gc or forget on another machine) is removed, and is never uploaded again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import tarfile
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from numpy.typing import NDArray

from spec import files
from spec.errors import SpecError
from spec.store import features, locks, segment, upkeep
from spec.store.bucket import Bucket, OnBytes, RemoteError, Stored
from spec.store.collection import DAMAGED, IDENTITY, NAME, Collection, collections
from spec.store.segment import DamagedError, Record, StoreError
from spec.store.upkeep import Removal

log = logging.getLogger(__name__)

STORE = "store.json"
UPLOADED = "uploaded"
"""An empty file beside a local segment's record: the bucket has or had this segment."""

LOCAL_STORE = "remote.json"
"""In the local folder: the store.json of the bucket that it mirrors."""

THREADS = 4
"""Segments that travel at a time."""

HEAD = 1 << 16
"""Bytes of an object that mostly hold its record."""

PAUSE = 5.0
"""Seconds between two looks for new segments while workers write them."""

DAY = 86400.0
_SEGMENT = re.compile(r"[^/]+/([0-9a-f]{32})\.tar")
_ROOT = re.compile(rf"{upkeep.ROOTS}/[0-9a-f]{{32}}\.json")

Progress = Callable[[int, str], AbstractContextManager[OnBytes]]
"""Given a number of bytes and what is done with them: something to be told of bytes that are done."""


@contextlib.contextmanager
def silent(total: int, label: str) -> Iterator[OnBytes]:
    """A Progress that shows nothing."""
    yield lambda count: None


def is_remote(store: str) -> bool:
    """Whether a store is named by a URL."""
    return store.startswith("s3://")


def local_folder(url: str) -> Path:
    """Where the segments of a store on S3 are kept on this machine: a folder for each server, bucket and prefix."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return files.cache_dir() / "s3" / bucket / files.digest_json([server.rstrip("/"), prefix.strip("/")])[:16]


@dataclass(frozen=True)
class RemoteSummary:
    """What a collection in the bucket holds.

    Attributes:
        name: of its folder.
        segments: that are there.
        bytes: of them.
        cached: how many of them this machine has.
    """

    name: str
    segments: int
    bytes: int
    cached: int


class Mirror:
    """Keeps a local folder in step with a store on S3. Making one connects to nothing.

    Args:
        url: s3://BUCKET or s3://BUCKET/PREFIX.
        progress: shows transfers.

    Raises:
        RemoteError: from every method that must reach the bucket and cannot.
    """

    def __init__(self, url: str, progress: Progress = silent) -> None:
        self.url = url
        self.root = local_folder(url)
        self._bucket = Bucket(url)
        self._progress = progress
        self._connected = False

    def connect(self) -> None:
        """Check that the bucket is there and the one that this folder mirrors; remove what others removed from it.

        Raises:
            StoreError: the store was emptied, or made anew, since this folder mirrored it.
        """
        if self._connected:
            return
        content = self._bucket.get(STORE)
        if content is None:
            new = json.dumps({"store": uuid.uuid4().hex}).encode()
            self._bucket.put(STORE, new, only_new=True)
            content = self._bucket.get(STORE) or new
        path = self.root / LOCAL_STORE
        if not path.is_file():
            for mark in self.root.glob(f"*/*/{UPLOADED}"):
                mark.unlink()  # of another store that this folder mirrored
            with files.replacing(path) as temporary:
                temporary.write_bytes(content)
        elif path.read_bytes() != content:
            raise StoreError(
                f"{self.url} is not the store that {self.root} mirrors: it was emptied or made anew. Remove that "
                f"folder to start from what the bucket has; or only {path}, and all of the folder is uploaded again"
            )
        self._connected = True
        self._drop_removed()

    def fetch(self, collection: Collection, keys: Iterable[str]) -> None:
        """Download the segments that hold rows of these keys which are not here; damaged ones are set aside.

        Raises:
            SpecError: the disk has no room for them.
        """
        self.connect()
        needed = set(keys)
        while wanted := needed - collection.find().keys():
            chosen: dict[str, Stored] = {}
            problems: dict[str, DamagedError] = {}
            there = self._absent(collection)
            for name, found in self._records(collection, there).items():
                if isinstance(found, DamagedError):
                    problems[name] = found
                elif not wanted.isdisjoint(found.items):
                    wanted -= set(found.items)
                    chosen[name] = there[name]
            problems |= self._download(collection, chosen)
            if not problems:
                return
            for name, error in problems.items():
                log.warning("segment %s in %s is damaged (%s): set aside", name, self.url, error.reason)
                self._set_aside(collection.folder.name, name)

    def fetch_segments(self, collection: Collection, names: Iterable[str]) -> None:
        """Download segments that are not here. Connects only where one is missing; what the bucket lacks stays away.

        Raises:
            StoreError: a segment in the bucket is damaged.
            SpecError: the disk has no room for them.
        """
        missing = [name for name in names if not collection.has(name)]
        if not missing:
            return
        self.connect()
        with locks.in_use(self.root):
            collection.create()
            there = self._absent(collection)
            for damaged in self._download(collection, {n: there[n] for n in missing if n in there}).values():
                raise StoreError(
                    f"segment {damaged.name} in {self.url} is damaged ({damaged.reason}); run the cache stage, which "
                    "computes its rows again"
                )

    def keys(self, collection: Collection) -> set[str]:
        """Keys of the rows that the bucket has and this machine lacks; downloads no segment."""
        self.connect()
        found = self._records(collection, self._absent(collection)).values()
        return {key for record in found if isinstance(record, Record) for key in record.items}

    @contextlib.contextmanager
    def uploading(self, work: bool) -> Iterator[None]:
        """Upload segments as they are committed, by whatever process, while the block runs; wait for the last ones.

        A failed upload is tried again until the block ends. If the block fails, the next run uploads what is left.

        Args:
            work: whether the block makes segments: then it begins with a check that the bucket can be written to.
        """
        self.connect()
        if work:
            self._bucket.put("writable", b"")
        ending, cancelled = threading.Event(), threading.Event()
        thread = threading.Thread(target=self._push_until, args=(ending, cancelled), name="segment-uploader")
        thread.start()
        try:
            yield
        except BaseException:
            cancelled.set()
            raise
        finally:
            ending.set()
            thread.join()
        try:
            self.push(self._progress)
        except RemoteError as error:
            raise RemoteError(f"{error}. What was computed is kept in {self.root}; the next run uploads it") from error

    def push(self, progress: Progress = silent, cancelled: threading.Event | None = None) -> None:
        """Upload every whole segment that the bucket never had.

        Where it has a segment of that name by now, another machine computed the same rows: if their bits differ (on
        another kind of device they may), the bucket's are taken, so that a manifest names what all machines find.

        Args:
            progress: shows the bytes that are sent.
            cancelled: stops the uploads when set.
        """
        cancelled = cancelled or threading.Event()
        for folder in collections(self.root):
            pending = [name for name in segment.names(folder) if _is_pending(folder / name)]
            if not pending:
                continue
            try:
                collection = Collection.open(folder)
            except StoreError:
                continue  # of an older version, or damaged: nothing that another machine could use
            self._push_all(collection, pending, progress, cancelled)

    def _push_all(
        self, collection: Collection, pending: Sequence[str], progress: Progress, cancelled: threading.Event
    ) -> None:
        folder = collection.folder
        there = self._bucket.objects(f"{folder.name}/")
        if f"{folder.name}/{IDENTITY}" not in there:
            self._bucket.put(f"{folder.name}/{IDENTITY}", (folder / IDENTITY).read_bytes())
        known = _segments(there)
        whole = {name: size for name in pending if (size := _size(collection, name)) is not None}
        total = sum(size for name, size in whole.items() if name not in known)
        failed = threading.Event()
        with progress(total, f"upload to {self.url}") as on_bytes:

            def count(sent: int) -> None:
                if cancelled.is_set() or failed.is_set():
                    raise RemoteError(f"{self.url}: uploads were stopped; the next run goes on with them")
                on_bytes(sent)

            with ThreadPoolExecutor(THREADS) as pool:
                try:
                    done = [pool.submit(self._push, collection, name, name in known, count) for name in whole]
                    for future in done:
                        future.result()
                except BaseException:
                    failed.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def push_roots(self) -> None:
        """Write down in the bucket which manifests this machine has used today."""
        there = self._bucket.objects(f"{upkeep.ROOTS}/")
        for path in (self.root / upkeep.ROOTS).glob("*.json"):
            used, name = path.stat().st_mtime, f"{upkeep.ROOTS}/{path.name}"
            if used > time.time() - DAY and (name not in there or there[name].modified < used):
                self._bucket.put(name, path.read_bytes())

    def summaries(self) -> list[RemoteSummary]:
        """Every collection in the bucket."""
        self.connect()
        found = []
        for folder in self._folders():
            there = _segments(self._bucket.objects(f"{folder}/"))
            cached = sum((self.root / folder / name / segment.RECORD).is_file() for name in there)
            found.append(RemoteSummary(folder, len(there), sum(stored.size for stored in there.values()), cached))
        return found

    def missing(self, collection: Collection, names: Sequence[str]) -> list[str]:
        """Of segments that are not whole here, those that are not simply to be downloaded: the bucket lacks them too,
        or what is here in their place is damaged."""
        self.connect()
        there = _segments(self._bucket.objects(f"{collection.folder.name}/"))
        return [name for name in names if collection.has(name) or name not in there]

    def verify(self, set_aside: bool) -> tuple[int, list[StoreError]]:
        """Read everything in the bucket; keeps nothing of it here.

        Args:
            set_aside: whether to move damaged segments out of sight. Where a whole copy is here, it is uploaded.

        Returns:
            The number of whole segments, and an error for each damaged one.
        """
        self.connect()
        whole = 0
        problems: list[StoreError] = []
        for folder in self._folders():
            try:
                collection = self._collection(folder)
            except StoreError as error:
                problems.append(error)
                continue
            there = _segments(self._bucket.objects(f"{folder}/"))
            failed = self._download(collection, there, keep=lambda rows: False, again=True)
            whole += len(there) - len(failed)
            for name, damage in failed.items():
                problems.append(StoreError(f"segment {name} in {self.url}/{folder} is damaged ({damage.reason})"))
                if set_aside:
                    self._set_aside(folder, name)
        if set_aside and problems:
            self._drop_removed()
            self.push()
        return whole, problems

    def gc(self, older_than: float, remove: bool) -> tuple[Removal, Removal]:
        """Remove from the bucket what upkeep.gc removes from a local store; afterwards, from this machine too.

        Manifests of every machine count: on which path they lie is known only here, so one of another machine counts
        for as long as `older_than` after it was last used.

        Args:
            older_than: seconds.
            remove: False: only count.

        Returns:
            What was removed from the bucket, and from this machine.
        """
        self.connect()
        self.push_roots()
        roots = self._pull_roots()
        local = upkeep.gc(self.root, older_than, remove)
        removal, before = Removal(), time.time() - older_than
        live = upkeep.live_segments(self.root, before)
        for folder in self._folders():
            objects = self._bucket.objects(f"{folder}/")
            named = live.get(folder, set())
            tables = self._tables(folder)
            there = _segments(objects)
            gone = {n for n, s in there.items() if n not in named and n != tables and s.modified <= before}
            if not named and there.keys() - gone <= {tables}:
                gone = set(there)
            removal.segments += len(gone)
            removal.kept += len(there) - len(gone)
            removal.bytes += sum(there[name].size for name in gone)
            if remove and gone == there.keys():
                self._bucket.remove(f"{folder}/", lambda name, seen: True)
            elif remove:
                names = {_object(folder, name) for name in gone}
                self._bucket.remove(
                    f"{folder}/",
                    lambda name, seen: name in names or _is_litter(name),  # noqa: B023
                )
        if remove:
            lost = {name for name in roots if not (self.root / name).is_file()}
            self._bucket.remove(f"{upkeep.ROOTS}/", lambda name, seen: name in lost)
            self._bucket.abort_uploads(before)
        return removal, local

    def forget(
        self, tokenizer: str, prompts: Sequence[NDArray[np.int32]], texts: Sequence[NDArray[np.int32]]
    ) -> Removal:
        """Remove every stored row of given sequences, as upkeep.forget does, from the bucket and from this machine.

        From the bucket go, in the collections of this tokenizer, the segments concerned, whatever was set aside or
        overwritten there, and unfinished uploads. A copy on another machine goes when that machine next uses the
        store. Run it again if it fails: it then does what is left.

        Raises:
            StoreError: a segment that cannot be read, in the bucket or here.
        """
        self.connect()
        given = upkeep.matcher(prompts, texts)
        concerned = [c for c in map(self._collection, self._folders()) if c.identity.get("tokenizer") == tokenizer]
        with locks.in_use(self.root):
            for collection in concerned:
                absent = self._absent(collection)
                absent.pop(collection.name_of(features.TABLES), None)
                keep = lambda rows: any(map(given, rows))  # noqa: E731
                for damaged in self._download(collection, absent, keep).values():
                    raise StoreError(
                        f"segment {damaged.name} in {self.url} cannot be read ({damaged.reason}), so it may hold them: "
                        "nothing was removed. `spec store verify` sets it aside; forget then removes it"
                    )
        removal = upkeep.forget(self.root, tokenizer, prompts, texts)
        self.push()
        for collection in concerned:
            folder = collection.folder
            gone = {_object(folder.name, path.name) for path in removal.paths if path.parent == folder}
            self._bucket.remove(
                f"{folder.name}/",
                lambda name, seen: not seen or name in gone or _is_litter(name),  # noqa: B023
            )
        self._bucket.abort_uploads(time.time() + DAY)
        return removal

    def _folders(self) -> list[str]:
        return [name for name in self._bucket.folders() if NAME.fullmatch(name)]

    def _collection(self, folder: str) -> Collection:
        """The collection of the bucket's folder, which is made here, too.

        Raises:
            StoreError: its identity is not that of its name, or of another version.
        """
        content = self._bucket.get(f"{folder}/{IDENTITY}")
        if content is None:
            raise StoreError(f"{self.url}/{folder} has no {IDENTITY}; remove what is under it")
        path = self.root / folder / IDENTITY
        if not path.is_file():
            with files.replacing(path) as temporary:
                temporary.write_bytes(content)
            try:
                Collection.open(path.parent)
            except StoreError:
                shutil.rmtree(path.parent)
                raise
        collection = Collection.open(path.parent)
        collection.create()
        return collection

    def _tables(self, folder: str) -> str | None:
        """The name of the segment of the base's tables; None where it cannot be known."""
        try:
            identity = json.loads(self._bucket.get(f"{folder}/{IDENTITY}") or b"{}")
            identity.pop("format")
            return Collection(self.root, folder.partition("-")[0], identity).name_of(features.TABLES)
        except (ValueError, KeyError, AttributeError):
            return None

    def _absent(self, collection: Collection) -> dict[str, Stored]:
        """The bucket's segments that are not here."""
        there = _segments(self._bucket.objects(f"{collection.folder.name}/"))
        return {name: stored for name, stored in there.items() if not collection.has(name)}

    def _records(self, collection: Collection, names: Iterable[str]) -> dict[str, Record | DamagedError]:
        """What segments of the bucket hold, from their first bytes."""
        with ThreadPoolExecutor(4 * THREADS) as pool:
            return {name: found for name, found in pool.map(lambda n: (n, self._record(collection, n)), names) if found}

    def _record(self, collection: Collection, name: str) -> Record | DamagedError | None:
        key = _object(collection.folder.name, name)
        try:
            head = self._bucket.get(key, HEAD)
            if head is None:
                return None  # removed meanwhile
            member = tarfile.TarInfo.frombuf(head[:512], "utf-8", "strict")
            if len(head) < 512 + member.size:
                head = self._bucket.get(key, 512 + member.size) or b""
            record = Record.from_bytes(name, head[512 : 512 + member.size])
            if collection.name_of(record.items) != name:
                raise ValueError("its record lists other rows than its name stands for")
        except RemoteError:
            raise
        except (tarfile.TarError, ValueError, KeyError, TypeError, AttributeError) as error:
            return DamagedError(collection.folder, name, error)
        return record

    def _download(
        self,
        collection: Collection,
        names: Mapping[str, Stored],
        keep: Callable[[Sequence[segment.Row]], bool] = lambda rows: True,
        again: bool = False,
    ) -> dict[str, DamagedError]:
        """Take in segments as Collection.receive does; returns those that are damaged."""
        if not names:
            return {}
        total = sum(stored.size for stored in names.values())
        most = max(stored.size for stored in names.values())
        self._need_space(min(total, 2 * THREADS * most) + (0 if again else total))

        def receive(name: str) -> DamagedError | None:
            try:
                collection.receive(name, lambda folder: self._unpack(collection, name, folder, on_bytes), keep, again)
            except DamagedError as error:
                return error
            return None

        with self._progress(total, f"download from {self.url}") as on_bytes, ThreadPoolExecutor(THREADS) as pool:
            found = dict(zip(names, pool.map(receive, names), strict=True))
        return {name: error for name, error in found.items() if error is not None}

    def _unpack(self, collection: Collection, name: str, folder: Path, on_bytes: OnBytes) -> None:
        with tempfile.TemporaryFile(dir=collection.folder) as file:
            self._bucket.download(_object(collection.folder.name, name), file, on_bytes)
            file.seek(0)
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    _extract(tar, folder)
                (folder / UPLOADED).touch()
            except (tarfile.TarError, ValueError, EOFError) as error:
                raise DamagedError(collection.folder, name, error) from error

    def _push(self, collection: Collection, name: str, known: bool, on_bytes: OnBytes) -> None:
        if known:
            found = self._record(collection, name)
            if isinstance(found, Record):
                if found.digest != collection.record(name).digest:
                    collection.receive(name, lambda into: self._unpack(collection, name, into, on_bytes), again=True)
                (collection.folder / name / UPLOADED).touch()
                return
        with tempfile.TemporaryFile(dir=collection.folder) as file:
            _pack(collection.folder / name, collection.record(name), file)
            file.seek(0)
            self._bucket.upload(_object(collection.folder.name, name), file, on_bytes)
        (collection.folder / name / UPLOADED).touch()

    def _push_until(self, ending: threading.Event, cancelled: threading.Event) -> None:
        failed = False
        while not ending.wait(PAUSE):
            try:
                self.push(cancelled=cancelled)
                failed = False
            except Exception as error:  # the last push, on the caller's thread, raises what does not go away
                if not failed:
                    log.warning("an upload failed and is tried again: %s", error)
                failed = True

    def _pull_roots(self) -> dict[str, Stored]:
        """Bring the roots of other machines here, and when they were last used; returns the bucket's.

        Whatever else lies beside them (a console's folder marker, say) is none of the store's.
        """
        objects = self._bucket.objects(f"{upkeep.ROOTS}/")
        there = {name: stored for name, stored in objects.items() if _ROOT.fullmatch(name)}
        for name, stored in there.items():
            path = self.root / name
            content = None if path.is_file() else self._bucket.get(name)
            if content is not None:
                with files.replacing(path) as temporary:
                    temporary.write_bytes(content)
                os.utime(path, (stored.modified, stored.modified))
            elif path.is_file() and path.stat().st_mtime < stored.modified:
                os.utime(path, (stored.modified, stored.modified))
        return there

    def _drop_removed(self) -> None:
        """Remove local segments that others removed from the bucket, unless a stage is reading here just now."""
        gone: list[Path] = []
        for folder in collections(self.root):
            marked = [name for name in segment.names(folder) if (folder / name / UPLOADED).is_file()]
            objects = self._bucket.objects(f"{folder.name}/") if marked else {}
            for name in marked:
                if _object(folder.name, name) in objects:
                    continue
                if _object(folder.name, DAMAGED + name) in objects:
                    (folder / name / UPLOADED).unlink()  # only the bucket's copy was bad: push mends it
                else:
                    gone.append(folder / name)
        if gone:
            try:
                with locks.alone(self.root):
                    for path in gone:
                        hidden = path.with_name(segment.PARTIAL + path.name)  # never a segment without its mark
                        shutil.rmtree(hidden, ignore_errors=True)
                        shutil.rmtree(path.rename(hidden))
                log.info("%d segments that were removed from %s are removed here, too", len(gone), self.url)
            except SpecError:
                log.warning(
                    "%d segments that were removed from %s are in use here; the next run removes them",
                    len(gone),
                    self.url,
                )

    def _set_aside(self, folder: str, name: str) -> None:
        self._bucket.move(_object(folder, name), _object(folder, DAMAGED + name))

    def _need_space(self, needed: int) -> None:
        free = files.free_bytes(self.root)
        if needed > free:
            raise SpecError(
                f"segments from {self.url} need up to {needed / 1e9:.1f} GB in {self.root}, where {free / 1e9:.1f} GB "
                "are free; free some, or let XDG_CACHE_HOME name a folder on a larger disk"
            )


def _object(folder: str, name: str) -> str:
    return f"{folder}/{name}.tar"


def _segments(objects: Mapping[str, Stored]) -> dict[str, Stored]:
    """The segments among a collection's objects, by their names."""
    matches = ((_SEGMENT.fullmatch(name), stored) for name, stored in objects.items())
    return {match[1]: stored for match, stored in matches if match}


def _is_litter(name: str) -> bool:
    return name.rpartition("/")[2].startswith(DAMAGED)


def _is_pending(folder: Path) -> bool:
    return (folder / segment.RECORD).is_file() and not (folder / UPLOADED).exists()


def _size(collection: Collection, name: str) -> int | None:
    """Bytes of a segment's object; None where the segment is seen to be damaged."""
    try:
        record = collection.record(name)
    except DamagedError:
        return None
    sizes = [len(record.to_bytes()), *(size for size, _ in record.files.values())]
    blocks = 2 + sum(1 + -(-size // tarfile.BLOCKSIZE) for size in sizes)
    return -(-blocks * tarfile.BLOCKSIZE // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _pack(folder: Path, record: Record, file: IO[bytes]) -> None:
    """Write a segment as a tar that depends on nothing but its files."""

    def bare(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        member.mode = 0o644
        return member

    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in (segment.RECORD, *sorted(record.files)):
            tar.add(folder / path, arcname=path, recursive=False, filter=bare)


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    """Plain files below the folder and nothing else (Python before 3.11.4 has no filter="data").

    Raises:
        ValueError: a member that is no plain file, or lies elsewhere.
    """
    for member in tar:
        path = PurePosixPath(member.name)
        content = tar.extractfile(member) if member.isreg() else None
        if path.is_absolute() or ".." in path.parts or content is None:
            raise ValueError(f"{member.name!r} is no plain file of a segment")
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with content, target.open("wb") as file:
            shutil.copyfileobj(content, file)

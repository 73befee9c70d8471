"""Copying segments between a store and the same layout elsewhere: a folder, or any URL that fsspec knows.

Segments never change and their names stand for their content, so a copy needs no bookkeeping: what one side has and
the other lacks is copied. A segment is visible where its record is, and its record arrives when all of it is there
and has been verified. So nothing that a killed transfer left is taken for whole, and the next one completes it.
"""

import contextlib
import errno
import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from spec.errors import SpecError
from spec.store.collection import IDENTITY, NAME, Collection
from spec.store.segment import FORMAT, RECORD, DamagedError, Record, StoreError

log = logging.getLogger(__name__)

THREADS = 4  # segments that are copied at the same time; four times as many are asked about
PAUSE = 5.0  # seconds between two looks of `follow`
_SEGMENT = re.compile("[0-9a-f]{32}")
OnBytes = Callable[[int], object]


class TransferError(StoreError):
    """A place cannot be reached, read or written."""


class Place:
    """A store's layout in a folder or at a URL; its methods raise a TransferError where it cannot be reached."""

    def __init__(self, url: str | Path) -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        try:
            self._fs, path = fsspec.url_to_fs(str(url), use_listings_cache=False, skip_instance_cache=True)
        except Exception as error:  # a package is missing, the URL is none; some file systems connect at once
            raise StoreError(
                f"{url} cannot be used ({error}); expected is a folder or a URL that fsspec knows, with the package "
                "that it needs (for s3://, pip install '.[s3]')"
            ) from None
        self.url, self._path = str(url).rstrip("/"), str(path).rstrip("/")
        self.folder = Path(path) if isinstance(self._fs, LocalFileSystem) else None

    def collections(self) -> list[str]:
        """Names of the collections' folders."""
        return self._names("", NAME)

    def segments(self, collection: str) -> list[str]:
        """Names of the segments' folders, whole or not."""
        return self._names(f"/{collection}", _SEGMENT)

    def read(self, name: str) -> bytes | None:
        """A small file, or None."""
        with self._clear(f"read {name}"), contextlib.suppress(FileNotFoundError):
            content: bytes = self._fs.cat_file(f"{self._path}/{name}")
            return content
        return None

    def download(self, name: str, target: Path) -> None:
        """Copy a file from here; one that is not here is left out, which verification notices."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._clear(f"read {name}"), contextlib.suppress(FileNotFoundError):
            self._fs.get_file(f"{self._path}/{name}", str(target))

    def upload(self, source: Path, name: str) -> None:
        """Copy a file to here."""
        with self._clear(f"write {name}"):
            self._fs.put_file(str(source), f"{self._path}/{name}")

    def _names(self, under: str, kind: re.Pattern[str]) -> list[str]:
        with self._clear(f"list {self._path}{under}"), contextlib.suppress(FileNotFoundError):
            listed = self._fs.ls(self._path + under, detail=False)
            return sorted(filter(kind.fullmatch, (path.rstrip("/").rpartition("/")[2] for path in listed)))
        return []

    @contextlib.contextmanager
    def _clear(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every file system has errors of its own
            if isinstance(error, SpecError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
                raise
            raise TransferError(
                f"{self.url}: could not {what} ({type(error).__name__}: {error}); check the address, the credentials "
                "and the network, then run the same command again: what has been copied stays"
            ) from error


@dataclass(frozen=True)
class Lacking:
    """A segment that the target lacks, or has a damaged record of."""

    collection: Collection  # at the target where that is a folder, else at the source
    record: Record  # the source's
    damaged: bool  # whether the target has a damaged one

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return self.record.size + len(self.record.to_bytes())


class Transfer:
    """Copies from `source` what `target` lacks. At least one of the two places is a folder.

    only: names of segments by their collection's folder; None: all that the source has.
    found, copied: numbers of segments that the target had already, and that were copied.
    problems: what could not be copied, and why.
    """

    def __init__(self, source: Place, target: Place, only: Mapping[str, Iterable[str]] | None = None) -> None:
        if source.folder and target.folder and source.folder.resolve() == target.folder.resolve():
            raise StoreError(f"{target.url} is the store itself; name another folder or a URL")
        self.source, self.target = source, target
        self.found = self.copied = 0
        self.problems: list[StoreError] = []
        self._only = only
        self._settled: dict[str, set[str]] = {}
        self._lock = threading.Lock()

    def look(self) -> list[Lacking]:
        """What the target lacks just now; what earlier looks and copies have settled is not asked about again."""
        found: list[Lacking] = []
        for name in self.source.collections() if self._only is None else sorted(self._only):
            settled = self._settled.setdefault(name, set())
            asked = {*(self.source.segments(name) if self._only is None else self._only[name])} - settled
            collection = self._collection(name) if asked else None
            if collection is None:
                settled |= asked
                continue
            with ThreadPoolExecutor(4 * THREADS, thread_name_prefix="segment-looker") as pool:
                found += filter(None, pool.map(partial(self._compare, collection), sorted(asked)))
        return found

    def copy(self, segments: Sequence[Lacking], on_bytes: OnBytes = lambda count: None) -> None:
        """Copy segments that `look` found; damaged ones are not copied, and named in `problems`.

        One thread at a time calls `on_bytes` with the bytes of a segment that is done. Where a place cannot be reached
        (a TransferError), segments in hand are completed and others are not begun.
        """
        for folder, collection in {item.collection.folder: item.collection for item in segments}.items():
            if self.target.folder:
                collection.create()
            elif self.target.read(path := f"{folder.name}/{IDENTITY}") is None:
                self.target.upload(folder / IDENTITY, path)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="segment-copier") as pool:
            list(pool.map(partial(self._copy, on_bytes), segments))  # an error cancels those that are not begun

    def follow(self, stopping: threading.Event, on_look: OnBytes, on_bytes: OnBytes) -> None:
        """Copy what is there and what is added, until `stopping` is set; then look a last time.

        `on_look` is called with the bytes that are to be copied now. A look that fails is tried again, but for the
        last one, whose TransferError is raised.
        """
        last = False
        while not last:
            last = stopping.is_set()
            try:
                lacking = self.look()
                on_look(sum(item.size for item in lacking))
                self.copy(lacking, on_bytes)
            except TransferError as error:
                if last:
                    raise
                log.warning("%s. It is tried again in %g seconds", error, PAUSE)
            stopping.wait(0 if last else PAUSE)

    def _collection(self, name: str) -> Collection | None:
        """A collection of the source; None where it is not to be copied."""
        content, other = (place.read(f"{name}/{IDENTITY}") for place in (self.source, self.target))
        with contextlib.suppress(ValueError, LookupError, TypeError):
            if (found := json.loads(content or b"")["format"]) != FORMAT:
                log.warning("%s/%s has the format %s, not %s: it is not copied", self.source.url, name, found, FORMAT)
                return None
        try:
            if other not in (None, content):
                raise StoreError(
                    f"{self.target.url}/{name}/{IDENTITY} differs from that of {self.source.url}: one of them is "
                    "damaged, and nothing of this collection was copied. Compare both, and remove the damaged one"
                )
            return Collection.open((self.target.folder or self.source.folder or Path()) / name, content or b"")
        except StoreError as error:
            self.problems.append(error)
            return None

    def _compare(self, collection: Collection, name: str) -> Lacking | None:
        folder = collection.folder.name
        there = self.target.read(f"{folder}/{name}/{RECORD}")
        with contextlib.suppress(ValueError):
            if there is not None and Record.from_bytes(name, there):
                with self._lock:
                    self.found += 1
                self._settled[folder].add(name)
                return None
        here = self.source.read(f"{folder}/{name}/{RECORD}")
        try:
            if here is None and self._only is not None:
                raise ValueError("it has no record")
            return None if here is None else Lacking(collection, Record.from_bytes(name, here), there is not None)
        except ValueError as error:
            self._refuse(folder, name, error)
            return None

    def _refuse(self, folder: str, name: str, reason: object) -> None:
        self._settled[folder].add(name)
        self.problems.append(
            StoreError(
                f"segment {name} in {self.source.url}/{folder} is missing or damaged ({reason}) and was not copied"
            )
        )

    def _copy(self, on_bytes: OnBytes, item: Lacking) -> None:
        collection, name = item.collection, item.record.name
        where = f"{collection.folder.name}/{name}"

        def fill(folder: Path) -> None:  # where the segment is verified afterwards
            for path in item.record.files:
                self.source.download(f"{where}/{path}", folder / path)
            (folder / RECORD).write_bytes(item.record.to_bytes())

        try:
            if self.target.folder:
                if item.damaged:
                    collection.set_aside(name)
                collection.receive(name, fill)
            else:
                record = collection.verify(name)
                for path in (*record.files, RECORD):  # the record last: only then is the segment visible
                    self.target.upload(collection.folder / name / path, f"{where}/{path}")
            with self._lock:
                self.copied += 1
            self._settled[collection.folder.name].add(name)
        except DamagedError as error:
            self._refuse(collection.folder.name, name, error.reason)
        with self._lock:
            on_bytes(item.size)

"""All segments of one identity: what is there, what is damaged, who computes what is missing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spec import files
from spec.device import on_this_device
from spec.store import segment
from spec.store.codecs import Codec
from spec.store.locks import Lock
from spec.store.segment import FORMAT, Arrays, DamagedError, Record, Row, StoreError

IDENTITY = "identity.json"
DAMAGED = ".damaged-"
_LOCK = ".lock-"
_HEX = "[0-9a-f]" * 32
NAME = re.compile("[a-z]+-[0-9a-f]{16}")
"""Of a collection's folder."""


@dataclass(frozen=True)
class Collection:
    """Segments that share one identity; nothing computed under another identity is ever found here.

    Attributes:
        root: the store.
        kind: what is kept: "states" of one tap, the base's "tables", or "answers".
        identity: everything the content depends on beside the row itself.
    """

    root: Path
    kind: str
    identity: Mapping[str, Any]
    _records: dict[str, Record] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path, content: bytes | None = None) -> Collection:
        """The collection of a folder, from its identity.json or from this content of one.

        Raises:
            StoreError: its identity.json is missing, damaged, or not the one that the folder is named for.
        """
        try:
            content = (folder / IDENTITY).read_bytes() if content is None else content
            identity = json.loads(content)
            version = identity.pop("format")
            if version != FORMAT:
                raise ValueError(
                    f"its format is {version}, this version reads {FORMAT}: `spec respond` and `spec cache` make anew "
                    "what it holds, and `spec store gc` removes it"
                )
            found = cls(folder.parent, folder.name.rpartition("-")[0], identity)
            if found._identity_bytes() != content or found.folder.name != folder.name:
                raise ValueError(f"{IDENTITY} is not as it was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{folder} is no collection of segments ({error})") from error
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of the identity."""
        return files.digest_json(self._identity())

    @property
    def folder(self) -> Path:
        """Where this identity's segments lie."""
        return self.root / f"{self.kind}-{self.digest[:16]}"

    def create(self) -> None:
        """Make the folder, write down the identity, and clean up after killed processes.

        Raises:
            StoreError: another identity is written down here; names the field and both values.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / IDENTITY).is_file():
            with files.whole(self.folder / IDENTITY) as temporary:
                temporary.write_bytes(self._identity_bytes())
        self.check()
        self._clean()

    def check(self) -> None:
        """Check that the folder is empty or of this identity.

        Raises:
            StoreError: names the field and both values.
        """
        path = self.folder / IDENTITY
        if not path.is_file():
            return  # then it holds no segment that anyone could mistake
        content = path.read_bytes()
        if content == self._identity_bytes():
            return
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
            if isinstance(found := json.loads(content), dict):
                check_identity(found, self._identity(), str(path))
        raise StoreError(f"{path} is damaged: remove it and run the stage again, which writes it anew")

    def records(self) -> dict[str, Record]:
        """The committed segments by name, without damaged ones; each record is read once."""
        return self.survey()[0]

    def survey(self) -> tuple[dict[str, Record], dict[str, DamagedError]]:
        """The committed segments by name, and those whose damage shows without reading their arrays."""
        good: dict[str, Record] = {}
        damaged: dict[str, DamagedError] = {}
        for name in segment.names(self.folder):
            try:
                good[name] = self.record(name)
            except DamagedError as error:
                damaged[name] = error
        return good, damaged

    def record(self, name: str) -> Record:
        """What one segment holds.

        Raises:
            DamagedError: it is missing or damaged.
        """
        if name not in self._records:
            record = segment.read_record(self.folder, name)
            if self.name_of(record.items) != name:
                raise DamagedError(self.folder, name, "its record lists other rows than its name stands for")
            segment.check_files(self.folder, record)
            self._records[name] = record
        return self._records[name]

    def find(self) -> dict[str, tuple[str, int]]:
        """Where each stored row lies: key -> (segment, row)."""
        return {key: (name, row) for name, record in self.records().items() for row, key in enumerate(record.items)}

    def name_of(self, items: Sequence[str]) -> str:
        """The name of the segment that holds exactly these rows."""
        return hashlib.sha256("\n".join([self.digest, *items]).encode()).hexdigest()[:32]

    def holds(self, items: Sequence[str]) -> bool:
        """Whether the segment of exactly these rows is here."""
        return (self.folder / self.name_of(items) / segment.RECORD).is_file()

    def claim(self, items: Sequence[str], wait: bool = False) -> Claim | None:
        """The sole right to compute the segment of these rows, until it is given back or this process dies.

        Returns:
            None where the segment is here already, or where another process computes it, unless told to `wait`.
        """
        lock = self._lock(self.name_of(items), wait)
        if lock is None:
            return None
        if self.holds(items):
            lock.release()
            return None
        return Claim(self, tuple(items), lock)

    def read(self, name: str, only: Sequence[str] | None = None) -> tuple[Arrays, dict[str, Any]]:
        """The arrays of a segment (`only` these, or all), checked, and its attributes.

        Raises:
            DamagedError: it is missing, damaged, or of another identity.
        """
        arrays, attributes = segment.read(self.folder, name, only)
        if attributes.get("identity") != self.digest:
            raise DamagedError(
                self.folder, name, f"its identity is {attributes.get('identity')}, expected {self.digest}"
            )
        return arrays, attributes

    def verify(self, name: str) -> Record:
        """Read everything of a segment, and check each row against its digest.

        Raises:
            DamagedError: it is missing, damaged, or of another identity.
        """
        record = self.record(name)
        arrays, attributes = self.read(name)
        segment.check_rows(self.folder, record, arrays, attributes)
        return record

    def receive(self, name: str, fill: Callable[[Path], object]) -> None:
        """Take in a segment that was written elsewhere, unless it is here already.

        Args:
            name: the segment's name.
            fill: puts the segment's files into a folder, where they are checked as `verify` does.

        Raises:
            DamagedError: what came is not the segment of this name; nothing of it is kept.
        """
        lock = self._lock(name, wait=True)
        assert lock is not None
        try:
            if (self.folder / name / segment.RECORD).is_file():
                return
            with files.whole(self.folder / name, folder=True) as incoming:
                fill(incoming)
                record = segment.read_record(self.folder, incoming.name)
                if self.name_of(record.items) != name:
                    raise DamagedError(self.folder, name, "it holds other rows than its name stands for")
                segment.check_rows(self.folder, record, *self.read(incoming.name))
        except DamagedError as error:
            raise DamagedError(self.folder, name, error.reason) from error
        finally:
            lock.release()

    def set_aside(self, name: str) -> Path:
        """Move a damaged segment out of sight, unless another process has or is writing it anew; returns where to."""
        target = self.folder / f"{DAMAGED}{name}"
        lock = self._lock(name)
        if lock is not None:
            try:
                with contextlib.suppress(FileNotFoundError):
                    files.remove(target)
                    files.move(self.folder / name, target)
            finally:
                lock.release()
        self._records.pop(name, None)
        return target

    def _lock(self, name: str, wait: bool = False) -> Lock | None:
        return Lock.acquire(self.folder / f"{_LOCK}{name}", wait)

    def _identity(self) -> dict[str, Any]:
        return {"format": FORMAT, **self.identity}

    def _identity_bytes(self) -> bytes:
        return (json.dumps(self._identity(), indent=2, ensure_ascii=False) + "\n").encode()

    def _clean(self) -> None:
        """Remove what killed processes of any machine left: half-written segments and locks that nobody holds."""
        for path in [*self.folder.glob(f"{_LOCK}*"), *self.folder.glob(f".{_HEX}-*")]:
            name = path.name.removeprefix(_LOCK).removeprefix(".")[:32]
            lock = self._lock(name)
            if lock is not None:
                for half in self.folder.glob(f".{name}-*"):
                    files.remove(half)
                lock.release()


def check_identity(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Compare two identities.

    Raises:
        StoreError: names the first field that differs, and both values.
    """
    for name in [*expected, *(key for key in found if key not in expected)]:
        if found.get(name) != expected.get(name):
            raise StoreError(
                f"{where}: its {name} is {found.get(name)!r}, and {expected.get(name)!r} is expected here; it was made "
                "for other parameters, base or data. Run the stages that make it again (dvc repro runs them)"
            )


@dataclass(frozen=True)
class Claim:
    """The right to compute one segment; see Collection.claim."""

    collection: Collection
    items: tuple[str, ...]
    lock: Lock

    def commit(self, rows: Iterable[Row], attributes: Mapping[str, Any], codec: Codec) -> Record:
        """Write the segment, and give the claim back."""
        made = self.collection
        known = {"identity": made.digest, "kind": made.kind, "codec": codec.name}
        try:
            name = made.name_of(self.items)
            return segment.write(made.folder, name, self.items, list(rows), {**attributes, **known}, codec)
        finally:
            self.release()

    def release(self) -> None:
        """Give the claim back."""
        self.lock.release()


Wanted = tuple[Collection, Sequence[str]]
"""A segment that is to be computed: its collection, and the content keys of its rows."""


def share_out(groups: Sequence[Sequence[Wanted]], rank: int, world: int) -> Iterator[tuple[int, list[Claim]]]:
    """Claim groups of segments for one of `world` workers: its own share first, then what nobody has begun, then what
    others left undone when they died. With a group come claims to those of its segments that are not there yet.

    It ends when every segment is committed, by whomever. Leaving early gives back the claims that came last. Wrong
    ranks cost only time.

    Raises:
        StoreError: the folder that the stage made is not to be seen from here.
    """
    for folder in {collection.folder for group in groups for collection, _ in group}:
        if not folder.is_dir():
            raise StoreError(
                f"{folder} is not here, though the stage that started this worker made it: all nodes need the same "
                "features.store on a file system that they share"
            )
    own_first = sorted(range(len(groups)), key=lambda index: index % world != rank % world)
    for wait in (False, True):
        for index in own_first:
            if claims := _claim_all(groups[index], wait):
                try:
                    yield index, claims
                except GeneratorExit:  # or a second try of the same process would wait for itself
                    _release(claims)
                    raise


def _claim_all(group: Sequence[Wanted], wait: bool) -> list[Claim]:
    """Claims to those of a group's segments that are not there; none where another process computes one of them, unless
    told to `wait` for it.

    All processes take locks in the order of the folders' names, so that no two of them wait for each other.
    """
    claims: list[Claim] = []
    for collection, items in sorted(group, key=lambda wanted: wanted[0].folder):
        if collection.holds(items):
            continue
        claim = collection.claim(items, wait)
        if claim is not None:
            claims.append(claim)
        elif not collection.holds(items):
            _release(claims)
            return []
    return claims


def _release(claims: Iterable[Claim]) -> None:
    """Give claims back."""
    for claim in claims:
        claim.release()


class Writer:
    """Commits groups of segments on a thread of its own, so that the base never waits for compression or the disk.

    At most one group waits while one is written. Leaving the block waits for both and raises what went wrong.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="segment-writer")
        self._pending: list[tuple[Sequence[Claim], Future[None]]] = []

    def write(self, claims: Sequence[Claim], commit: Callable[[], object]) -> None:
        """Commit a group soon; waits only when two are already on their way.

        Args:
            claims: the rights to its segments, which are given back when `commit` has ended.
            commit: called on the writer's thread, so that making rows ready delays nobody.
        """
        while len(self._pending) > 1:
            self._pending.pop(0)[1].result()
        self._pending.append((claims, self._pool.submit(on_this_device(self._run), claims, commit)))

    @staticmethod
    def _run(claims: Sequence[Claim], commit: Callable[[], object]) -> None:
        try:
            commit()
        finally:
            _release(claims)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            for claims, future in reversed(self._pending):  # what waits first, while it still waits
                if kind is not None and future.cancel():  # the run has failed: keep what is being written, no more
                    _release(claims)
                else:
                    future.result()
        finally:
            self._pool.shutdown()


def collections(root: Path) -> Iterator[Path]:
    """The folders of a store that hold collections, in order; others in the same place are none of the store's."""
    with contextlib.suppress(FileNotFoundError):
        yield from sorted(path for path in root.iterdir() if path.is_dir() and NAME.fullmatch(path.name))

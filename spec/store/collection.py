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
from spec.store.segment import FORMAT, Arrays, DamagedError, OutdatedError, Record, Row, StoreError

IDENTITY = "identity.json"
DAMAGED = ".damaged-"
_LOCK = ".lock-"
_HEX = "[0-9a-f]" * 32
NAME = re.compile("[a-z]+-[0-9a-f]{16}")  # of a collection's folder


@dataclass(frozen=True)
class Collection:
    """Segments that share one identity; nothing computed under another identity is ever found here."""

    root: Path  # the store
    kind: str  # "states" of one tap, the base's "tables", or "answers"
    identity: Mapping[str, Any]  # everything that the content depends on besides the row itself
    _records: dict[str, Record] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path, content: bytes | None = None) -> Collection:
        """The collection of a folder, from its identity.json or from this content of one; an OutdatedError says that
        it is missing, damaged, of another format, or not the one that the folder is named for."""
        try:
            content = (folder / IDENTITY).read_bytes() if content is None else content
            identity = json.loads(content)
            version = identity.pop("format")
            if version != FORMAT:
                raise ValueError(f"its format is {version}, this version reads {FORMAT}")
            found = cls(folder.parent, folder.name.rpartition("-")[0], identity)
            if found._identity_bytes() != content or found.folder.name != folder.name:
                raise ValueError(f"{IDENTITY} is not as it was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutdatedError(f"{folder} is no collection of segments ({error})") from error
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of the identity and the format."""
        return files.digest_json({"format": FORMAT, **self.identity})

    @property
    def folder(self) -> Path:
        """Where this identity's segments lie."""
        return self.root / f"{self.kind}-{self.digest[:16]}"

    def create(self) -> None:
        """Make the folder, write down the identity, check it, and clean up after killed processes of any machine."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / IDENTITY).is_file():
            with files.whole(self.folder / IDENTITY) as temporary:
                temporary.write_bytes(self._identity_bytes())
        self.check()
        for path in [*self.folder.glob(f"{_LOCK}*"), *self.folder.glob(f".{_HEX}-*")]:
            name = path.name.removeprefix(_LOCK).removeprefix(".")[:32]
            lock = self._lock(name)
            if lock is not None:  # nobody holds it
                for half in self.folder.glob(f".{name}-*"):
                    files.remove(half)
                lock.release()

    def check(self) -> None:
        """Check that the identity that is written down, if any, is this one."""
        path = self.folder / IDENTITY
        if path.is_file() and path.read_bytes() != self._identity_bytes():
            raise StoreError(f"{path} is damaged: remove it and run the stage again, which writes it anew")

    def records(self) -> dict[str, Record]:
        """The committed segments by name, without damaged ones."""
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
        """What one segment holds, which is read once; a DamagedError where it is missing or damaged."""
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

        None where the segment is here already, or where another process computes it, unless told to `wait`.
        """
        lock = self._lock(self.name_of(items), wait)
        if lock is not None and self.holds(items):
            lock.release()
            return None
        return None if lock is None else Claim(self, tuple(items), lock)

    def read(self, name: str, only: Sequence[str] | None = None) -> tuple[Arrays, dict[str, Any]]:
        """The arrays of a segment (`only` these, or all), and its attributes; a DamagedError where it is missing,
        damaged, or of another identity."""
        arrays, attributes = segment.read(self.folder, name, only)
        if (found := attributes.get("identity")) != self.digest:
            raise DamagedError(self.folder, name, f"its identity is {found}, expected {self.digest}")
        return arrays, attributes

    def verify(self, name: str) -> Record:
        """Read everything of a segment, and check each row against its digest; a DamagedError as in `read`."""
        record = self.record(name)
        segment.check_rows(self.folder, record, *self.read(name))
        return record

    def receive(self, name: str, fill: Callable[[Path], object]) -> None:
        """Take in a segment that was written elsewhere, unless it is here already.

        `fill` puts the segment's files into a folder, where they are checked as `verify` does. A DamagedError says that
        they are not the segment of this name, and nothing of them is kept.
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
            with contextlib.suppress(FileNotFoundError):
                files.remove(target)
                files.move(self.folder / name, target)
            lock.release()
        self._records.pop(name, None)
        return target

    def _lock(self, name: str, wait: bool = False) -> Lock | None:
        return Lock.acquire(self.folder / f"{_LOCK}{name}", wait)

    def _identity_bytes(self) -> bytes:
        return (json.dumps({"format": FORMAT, **self.identity}, indent=2, ensure_ascii=False) + "\n").encode()


def check_identity(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Compare two identities; an OutdatedError names the first field that differs, and both values."""
    for name in [*expected, *(key for key in found if key not in expected)]:
        if found.get(name) != expected.get(name):
            raise OutdatedError(
                f"{where}: its {name} is {found.get(name)!r}, and {expected.get(name)!r} is expected here; it was made "
                "for other parameters, base or data"
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


Wanted = tuple[Collection, Sequence[str]]  # a segment that is to be computed: its collection, and its rows' keys


def share_out(groups: Sequence[Sequence[Wanted]], rank: int, world: int) -> Iterator[tuple[int, list[Claim]]]:
    """Claim groups of segments for one of `world` workers: its own share first, then what nobody has begun, then what
    others left undone when they died. With a group come claims to those of its segments that are not there yet.

    It ends when every segment is committed, by whomever. If the caller stops early, the claims that
    came last are released.
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
    told to `wait` for it."""
    claims: list[Claim] = []
    for collection, items in sorted(group, key=lambda wanted: wanted[0].folder):  # so that no two wait for each other
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
    for claim in claims:
        claim.release()


class Writer:
    """Commits groups of segments on a thread of its own, so that the base never waits for compression or the disk.

    At most one group waits while one is written. Leaving the block waits for both and raises what went wrong; where the
    block itself has failed, only the group that is being written is kept.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="segment-writer")
        self._pending: list[Future[object]] = []

    def write(self, claims: Sequence[Claim], commit: Callable[[], object]) -> None:
        """Call `commit` soon on the writer's thread, then give the claims back; waits while two groups are on their
        way."""
        while len(self._pending) > 1:
            self._pending.pop(0).result()
        future = self._pool.submit(on_this_device(commit))
        future.add_done_callback(lambda _: _release(claims))
        self._pending.append(future)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        for future in self._pending:
            if not future.cancelled():
                future.result()


def collections(root: Path) -> Iterator[Path]:
    """The folders of a store that hold collections, in order; other folders there do not belong to the store."""
    with contextlib.suppress(FileNotFoundError):
        yield from sorted(path for path in root.iterdir() if path.is_dir() and NAME.fullmatch(path.name))

"""Looking after a store: what is in it, whether it is whole, what nobody needs any more, what must go.

A **root** is a small file in STORE/roots that names the segments which one manifest (or one file of answers) of some
workspace uses. Stages write it when they write or first read the manifest, and touch it when they read it again.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spec import files, lookup
from spec.store import index, segment
from spec.store.codecs import CODECS
from spec.store.collection import DAMAGED, Collection, collections
from spec.store.index import Start
from spec.store.locks import alone
from spec.store.segment import DamagedError, OutdatedError, Row, StoreError

ROOTS = "roots"


@dataclass(frozen=True)
class Summary:
    """What a collection holds: its whole segments with their rows and bytes, and what computed them."""

    folder: Path
    identity: Mapping[str, Any]
    segments: int
    rows: int
    bytes: int
    damaged: tuple[str, ...]  # names of segments that were set aside, or whose damage shows without reading arrays
    producers: tuple[str, ...]


@dataclass
class Removal:
    """What gc or forget removed."""

    segments: int = 0  # removed or rewritten
    rows: int = 0  # removed with them
    bytes: int = 0  # of the disk
    kept: int = 0  # segments that stay
    indexed: int = 0  # forget: source rows that the index knew
    missed: int = 0  # forget: source rows of which nothing was stored
    answers: set[tuple[int, ...]] = field(default_factory=set)  # forget: those that the removed rows held


def add_root(root: Path, path: Path, segments: Mapping[str, Sequence[str]]) -> None:
    """Write down that a file of a workspace needs these segments (by their collection's folder)."""
    target = _root_of(root, path)
    files.write_json(target, {"path": str(path.resolve()), "file": files.digest_file(path), "segments": segments})


def touch_root(root: Path, path: Path) -> bool:
    """Write down that a file of a workspace was used today; False where the store has no root of it."""
    with contextlib.suppress(OSError):
        os.utime(_root_of(root, path))
        return True
    return False


def root_segments(root: Path, path: Path) -> dict[str, list[str]]:
    """The segments that a file of a workspace needs; none where the store has no root of it."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return dict(files.read_json(_root_of(root, path))["segments"])
    return {}


def _root_of(root: Path, path: Path) -> Path:
    """Roots are kept by path and content: several branches and experiments write to the same path."""
    name = files.digest_json([str(path.resolve()), files.digest_file(path)])[:32]
    return root / ROOTS / f"{name}.json"


def summaries(root: Path) -> Iterator[Summary]:
    """Every collection of a store that can be read; verify names the others."""
    for folder in collections(root):
        with contextlib.suppress(StoreError):
            collection = Collection.open(folder)
            good, damaged = collection.survey()
            yield Summary(
                folder,
                collection.identity,
                len(good),
                sum(len(record.items) for record in good.values()),
                sum(record.size for record in good.values()),
                (*damaged, *(path.name.removeprefix(DAMAGED) for path in folder.glob(f"{DAMAGED}*"))),
                tuple(sorted({_producer(folder / name) for name in good})),
            )


def _producer(path: Path) -> str:
    attributes = files.read_json(path / "zarr.json").get("attributes", {})
    return ", ".join(f"{key} {value}" for key, value in attributes.get("producer", {}).items())


def verify(
    root: Path, set_aside: bool, on_segment: Callable[[int], object] = lambda size: None
) -> tuple[int, list[StoreError]]:
    """Read everything of a store; `set_aside` moves damaged segments out of sight, so that they are computed again.

    Returns the number of whole segments, whose bytes `on_segment` is called with, and an error for each damaged one.
    """
    whole = 0
    problems: list[StoreError] = []
    for folder in collections(root):
        try:
            collection = Collection.open(folder)
        except StoreError as error:
            problems.append(error)
            continue
        for name in segment.names(folder):
            try:
                on_segment(collection.verify(name).size)
                whole += 1
            except DamagedError as error:
                problems.append(error)
                if set_aside:
                    collection.set_aside(name)
    return whole, problems


def gc(root: Path, older_than: float, remove: bool = True) -> Removal:
    """Remove segments that no manifest names, and what damage and killed processes left.

    A manifest counts while a workspace still holds it, or while some stage has used it in the last `older_than`
    seconds (it may be an experiment's, or another branch's). A segment that no manifest names stays as long, too:
    it may be what an interrupted run has computed so far. Without `remove`, everything is only counted.
    """
    removal = Removal()
    drop: Callable[[Path], object] = files.remove if remove else lambda path: None
    with alone(root):
        before = time.time() - older_than
        live = _live_segments(root, before, drop)
        for folder in collections(root):
            named = live.get(folder.name, set())
            rest = 0
            for path in sorted(path for path in folder.iterdir() if path.is_dir()):
                if path.name in named or (not _is_litter(path) and path.stat().st_mtime > before):
                    rest += 1
                else:
                    removal.segments += 1
                    removal.bytes += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                    with contextlib.suppress(OSError, ValueError, LookupError):
                        removal.rows += len(json.loads((path / segment.RECORD).read_bytes())["items"])
                    drop(path)
            removal.kept += rest
            if not rest and not named:
                drop(folder)
    return removal


def _live_segments(root: Path, before: float, drop: Callable[[Path], object]) -> dict[str, set[str]]:
    """Names of the segments that manifests need, by collection folder; roots of manifests that count no more go."""
    live: dict[str, set[str]] = {}
    for path in sorted((root / ROOTS).glob("*.json")):
        try:
            entry = files.read_json(path)
            held = Path(entry["path"])
            present = held.is_file() and files.digest_file(held) == entry["file"]
            segments = entry["segments"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutdatedError(f"{path} is damaged ({error}); remove it") from None
        if present or path.stat().st_mtime > before:
            for folder, names in segments:
                live.setdefault(folder, set()).update(names)
        else:
            drop(path)
    return live


def _is_litter(path: Path) -> bool:
    """Whether it is a damaged segment that was set aside, or what a killed process left half-written."""
    return path.name.startswith(DAMAGED) or path.name.endswith((files.PARTIAL, files.OLD))


def forget(root: Path, tokenizer: str, rows: Mapping[bytes, Start | None]) -> Removal:
    """Remove every stored row of given source rows: states, ids, answers, their keys, and what the index has of them.

    A stored row goes when it begins as the index says of a source row, whatever tokenizer made it, or as the source
    row is tokenized now. A segment that holds such a row is written anew without it; its other rows are kept as they
    are, with their states. Manifests that name the old segment are then refused, and the cache stage writes new ones
    without the base.

    `rows` says by the digest of a source row how it begins as this tokenizer (its digest) renders it now, or None where
    it cannot; that says nothing of collections of other tokenizers.
    """
    removal = Removal()
    found: set[bytes] = set()
    with alone(root):
        indexed = index.find(root, rows)
        removal.indexed = len(indexed)
        anyhow = [(source, start) for source, starts in indexed.items() for start in starts]
        rendered = [(source, start) for source, start in rows.items() if start is not None]
        for folder in collections(root):
            collection = Collection.open(folder)
            known = anyhow + rendered if collection.identity.get("tokenizer") == tokenizer else anyhow
            if collection.kind == "tables" or not known:
                continue
            given = _matcher(known, found)
            for name in segment.names(folder):
                _forget(collection, name, given, removal)
            for path in filter(_is_litter, folder.iterdir()):
                files.remove(path)  # it cannot be read, so it may hold them
        index.drop(root, rows)
    removal.missed = len(rows.keys() - found)
    return removal


def _matcher(known: Sequence[tuple[bytes, Start]], found: set[bytes]) -> Callable[[Row], bool]:
    """Whether a stored row begins as one of the source rows does; adds those of which it is true to `found`."""
    rows_of: dict[Start, set[bytes]] = {}
    for source, start in known:
        rows_of.setdefault(start, set()).add(source)
    lengths = {start.length for start in rows_of}

    def given(row: Row) -> bool:
        ids = row["ids"] if "ids" in row else row["prompt"]
        matching: set[bytes] = set()
        for length in lengths:
            if length <= len(ids):
                for whole in {False, length == len(ids)}:
                    matching |= rows_of.get(Start(length, index.digest_ids(ids[:length]), whole), set())
        found.update(matching)
        return bool(matching)

    return given


def _forget(collection: Collection, name: str, given: Callable[[Row], bool], removal: Removal) -> None:
    record = collection.record(name)
    arrays, attributes = collection.read(name)
    rows = segment.rows_of(arrays, attributes)
    gone = {number: row for number, row in enumerate(rows) if given(row)}
    if not gone:
        removal.kept += 1
        return
    left = [number for number in range(len(rows)) if number not in gone]
    for row in gone.values():
        removal.answers.update(
            lookup.answers(row["ids"], row["mask"]) if "ids" in row else [tuple(row["answer"].tolist())]
        )
    removal.segments += 1
    removal.rows += len(gone)
    removal.bytes += record.size
    if left:
        claim = collection.claim([record.items[number] for number in left])
        if claim is not None:
            rest = claim.commit([rows[number] for number in left], attributes, CODECS[attributes["codec"]])
            removal.bytes -= rest.size
    files.remove(collection.folder / name)

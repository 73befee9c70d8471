"""Cached features as training and acceptance read them: whole sequences."""

import os
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from spec.device import on_this_device
from spec.heads import Packed
from spec.store.codecs import CODECS
from spec.store.collection import Collection
from spec.store.manifest import Manifest
from spec.store.segment import Arrays, OutdatedError

WINDOW = 8  # segments that are shuffled together: an epoch reads each segment once, and about this many are in use
AHEAD = 4  # segments that are decoded before they are needed
LOOK_AHEAD = 1000  # parts that are looked at before they are needed
DECODERS = 2  # threads that decode
MEMORY_SHARE = 0.25  # of what is free at the start: what decoded segments may keep, for all workers of a machine

T = TypeVar("T")
Key = tuple[int, str]  # a segment: the number of its tap in the manifest, and its name


@dataclass(frozen=True)
class Described:
    """What is known of each sequence of a split that lies in no store, as Manifest has it."""

    prompt_length: Sequence[int]
    written: Sequence[bool]
    domain: Sequence[int]
    domains: Sequence[str]


class SequenceReader(Protocol):
    """Where training and acceptance take sequences from: a FeatureReader, or a base that computes them anew."""

    @property
    def manifest(self) -> Manifest | Described:
        """What is known of each sequence."""

    def __len__(self) -> int: ...

    def sequences(self, indices: Iterable[int]) -> Iterator[tuple[int, Packed]]:
        """Sequences one by one, with their indices, in any order."""

    def batches(self, parts: Iterable[Sequence[int]]) -> Iterator[Packed]:
        """The sequences of each part."""


@dataclass(frozen=True)
class _Segment:
    """A decoded segment."""

    arrays: Arrays  # but for the encoded vectors
    vectors: Tensor

    @property
    def bytes(self) -> int:
        return self.vectors.nbytes + 5 * len(self.arrays["ids"])

    def tokens(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """ids and mask of a row."""
        tokens = slice(*self.arrays["token_offsets"][row : row + 2])
        return self.arrays["ids"][tokens], self.arrays["mask"][tokens]

    def states(self, row: int) -> Tensor:
        return self.vectors[slice(*self.arrays["state_offsets"][row : row + 2])]


class FeatureReader:
    """Reads the sequences of one split from the store, with the vectors of every tap that its manifest lists.

    Every chunk's checksum is checked at every read. Segments of different taps may hold different sequences. Decoded
    segments stay in memory as far as there is room, so that a split that fits is decoded once: `memory` bytes beyond
    those in use, or MEMORY_SHARE of what is free.
    """

    def __init__(self, manifest: Manifest, store: Path, memory: int | None = None) -> None:
        self.manifest, self.root = manifest, store
        self._collections = [places.collection(store) for places in manifest.taps]
        for collection in self._collections:
            collection.check()
        self._digests: dict[Key, str] = {
            (tap, name): digest
            for tap, places in enumerate(manifest.taps)
            for name, digest in zip(places.segments, places.digests, strict=True)
        }
        machine = MEMORY_SHARE * psutil.virtual_memory().available
        self._memory = machine / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if memory is None else memory
        self._segments: OrderedDict[Key, Future[_Segment]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="segment-reader")

    def check(self) -> None:
        """Check that every segment is there and the one that the manifest names, without reading its arrays."""
        for key in self._digests:
            self._check(key)

    def __len__(self) -> int:
        return len(self.manifest)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the states."""
        dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        return dtype

    @property
    def tables(self) -> Collection:
        """Where the base's tables are kept."""
        return self.manifest.tables(self.root)

    def packed(self, indices: Sequence[int], pin: bool = False) -> Packed:
        """These sequences, one after the other; in page-locked memory if asked for."""
        found = [[self._load(key).result() for key in self._keys(index)] for index in indices]
        tokens = [found[0].tokens(self.manifest.last.row[index]) for index, found in zip(indices, found, strict=True)]
        ids = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in tokens)])
        mask = np.concatenate([np.zeros(0, np.bool_), *(mask != 0 for _, mask in tokens)])
        states = {}
        for tap, places in enumerate(self.manifest.taps):
            none = torch.empty(0, places.width, dtype=self.dtype)
            parts = [each[tap].states(places.row[index]) for index, each in zip(indices, found, strict=True)]
            states[places.tap] = _together([none, *parts], pin)
        lengths = [len(ids) for ids, _ in tokens]
        packed = Packed.of(torch.from_numpy(ids), torch.from_numpy(mask), lengths, states)
        return packed.pin() if pin else packed

    def order(self, seed: int, epoch: int) -> list[int]:
        """All sequences, shuffled: segments first, then sequences within a window of WINDOW segments."""
        generator = np.random.default_rng([seed, epoch])
        last = self.manifest.last
        place = np.empty(len(last.segments), np.int64)
        place[generator.permutation(len(place))] = np.arange(len(place))
        window = place[np.asarray(last.segment, np.int64)] // WINDOW
        return [int(i) for i in np.lexsort((generator.random(len(window)), window))]

    def share(self, batch: Sequence[int], rank: int, world: int) -> list[int]:
        """One worker's part of a batch: all parts together are the batch, whatever the number of workers.

        Sequences of one segment stay together, so that a worker decodes but a part of a window's segments.
        """
        ordered = sorted(batch, key=lambda index: (self.manifest.last.segment[index], index))
        return ordered[len(ordered) * rank // world : len(ordered) * (rank + 1) // world]

    def batches(self, parts: Iterable[Sequence[int]], pin: bool = False) -> Iterator[Packed]:
        """The sequences of each part (by index), with segments decoded ahead; a DamagedError comes with the first part
        that needs a damaged segment."""
        for part in self._decoded_ahead(parts):
            yield self.packed(part, pin)

    def sequences(self, indices: Iterable[int]) -> Iterator[tuple[int, Packed]]:
        """Sequences one by one, in the order of the store, so that each segment is decoded once and ahead."""
        last = self.manifest.last
        ordered = sorted(indices, key=lambda index: (last.segment[index], last.row[index]))
        for (index,) in self._decoded_ahead([index] for index in ordered):
            yield index, self.packed([index])

    def _decoded_ahead(self, parts: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
        """The parts themselves, while what they and the next ones need is decoded."""
        source = iter(parts)
        waiting: deque[tuple[Sequence[int], set[Key]]] = deque()
        needed: Counter[Key] = Counter()
        most = (WINDOW + AHEAD) * len(self.manifest.taps)
        while True:
            while not waiting or (len(needed) < most and len(waiting) < LOOK_AHEAD):
                if (part := next(source, None)) is None:
                    break
                keys = {key for index in part for key in self._keys(index)}
                waiting.append((part, keys))
                needed.update(keys)
                for key in sorted(keys):
                    self._load(key, needed)
            if not waiting:
                return
            part, keys = waiting.popleft()
            yield part
            needed -= Counter(keys)

    def token_counts(self, prompts: bool = False) -> NDArray[np.int64]:
        """How often each token [V] is supervised in the split, or with `prompts` how often it occurs at all."""
        counts = np.zeros(self.manifest.vocab_size, np.int64)
        for ids, mask in self.tokens():
            counts += np.bincount(ids[(mask != 0) | prompts], minlength=len(counts))
        return counts

    def tokens(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
        """ids and mask of every sequence, segments in a drawn order; reads no states."""
        last = self.manifest.last
        rows: list[list[int]] = [[] for _ in last.segments]
        for segment, row in zip(last.segment, last.row, strict=True):
            rows[segment].append(row)
        for segment in np.random.default_rng(0).permutation(len(rows)):
            name, used = last.segments[segment], rows[segment]
            read = _Segment(self._read((0, name), ("ids", "mask", "token_offsets"))[0], torch.empty(0))
            yield from map(read.tokens, used)

    def _keys(self, index: int) -> list[Key]:
        """Of each tap the segment in which a sequence lies."""
        return [(tap, places.segments[places.segment[index]]) for tap, places in enumerate(self.manifest.taps)]

    def _load(self, key: Key, needed: Container[Key] = ()) -> Future[_Segment]:
        """The segment, being decoded or decoded; makes room by dropping those used longest ago and not needed."""
        with self._lock:
            if key not in self._segments:
                done = {k: f.result().bytes for k, f in self._segments.items() if f.done() and f.exception() is None}
                total = sum(done.values())
                for old in [old for old in done if old not in needed][:-1]:
                    if total > self._memory:
                        total -= done[old]
                        del self._segments[old]
                self._segments[key] = self._pool.submit(self._decode, key)
            self._segments.move_to_end(key)
            return self._segments[key]

    def _decode(self, key: Key) -> _Segment:
        arrays, attributes = self._read(key)
        vectors = CODECS[attributes["codec"]].decode(arrays, self.dtype)
        return _Segment({name: arrays[name] for name in ("ids", "mask", "token_offsets", "state_offsets")}, vectors)

    def _read(self, key: Key, only: Sequence[str] | None = None) -> tuple[Arrays, dict[str, Any]]:
        self._check(key)
        return self._collections[key[0]].read(key[1], only)

    def _check(self, key: Key) -> None:
        collection, name = self._collections[key[0]], key[1]
        if (found := collection.record(name).digest) != self._digests[key]:
            raise OutdatedError(
                f"segment {name} in {collection.folder} has the digest {found}, but the manifest names "
                f"{self._digests[key]}"
            )


def _together(tensors: list[Tensor], pin: bool) -> Tensor:
    """Joined along the first axis, and where asked for straight into page-locked memory."""
    if not pin:
        return torch.cat(tensors)
    shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
    return torch.cat(tensors, out=torch.empty(shape, dtype=tensors[0].dtype, pin_memory=True))


def prefetch(items: Iterable[T], depth: int = 4) -> Iterator[T]:
    """Make items on a thread, `depth` ahead; an exception there is raised here, and leaving early stops the thread."""
    end = object()
    make: Callable[[], Any] = on_this_device(partial(next, iter(items), end))
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead = deque(pool.submit(make) for _ in range(depth + 1))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(make))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)

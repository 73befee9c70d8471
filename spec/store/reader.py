"""Cached features as training and acceptance read them: whole sequences."""

from __future__ import annotations

import os
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from spec.heads import LAST, Packed
from spec.store.codecs import CODECS, Codec
from spec.store.manifest import Manifest
from spec.store.segment import DamagedError, StoreError

WINDOW = 8
"""Segments that are shuffled together: an epoch reads each segment once, and about this many are in use."""

AHEAD = 4
"""Segments that are decoded before they are needed."""

LOOK_AHEAD = 1000
"""Parts that are looked at before they are needed."""

DECODERS = 2
"""Threads that decode."""

MEMORY_SHARE = 0.25
"""Of the memory that is free at the start: what decoded segments may keep, shared by the workers of a machine."""

T = TypeVar("T")


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


class _Segment:
    """A decoded segment."""

    def __init__(self, arrays: dict[str, NDArray[Any]], dtype: torch.dtype, codec: Codec) -> None:
        self._states = codec.decode(arrays, dtype)
        self._ids, self._mask = arrays["ids"], arrays["mask"]
        self._token_offsets, self._state_offsets = arrays["token_offsets"], arrays["state_offsets"]
        self.bytes = self._states.nbytes + 5 * len(self._ids)

    def tokens(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """ids and mask of a row."""
        tokens = slice(*self._token_offsets[row : row + 2])
        return self._ids[tokens], self._mask[tokens]

    def states(self, row: int) -> Tensor:
        """The states of a row."""
        return self._states[slice(*self._state_offsets[row : row + 2])]


class FeatureReader:
    """Reads the sequences of one split from the store; every chunk's checksum is checked at every read.

    Decoded segments stay in memory as far as there is room, so that a split that fits is decoded once.

    Args:
        manifest: the split.
        store: the store's root.
        memory: bytes that decoded segments may keep beyond those in use; None: MEMORY_SHARE of what is free.

    Raises:
        StoreError: the store lacks a segment, or holds another one than the manifest names.
    """

    def __init__(self, manifest: Manifest, store: Path, memory: int | None = None) -> None:
        self.manifest = manifest
        self.collection = manifest.collection(store)
        self.collection.check()
        machine = MEMORY_SHARE * psutil.virtual_memory().available
        self._memory = machine / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if memory is None else memory
        self._segments: OrderedDict[str, Future[_Segment]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="segment-reader")
        for name, digest in zip(manifest.segments, manifest.digests, strict=True):
            try:
                record = self.collection.record(name)
            except DamagedError as error:
                raise StoreError(
                    f"segment {name} is not in {self.collection.folder}, or damaged ({error.reason}); run the cache "
                    "stage (it computes only what is missing), or point features.store to the manifest's own store"
                ) from error
            if record.digest != digest:
                raise StoreError(
                    f"segment {name} in {self.collection.folder} has the digest {record.digest}, but the manifest "
                    f"names {digest}; run the cache stage again"
                )

    def __len__(self) -> int:
        return len(self.manifest)

    @property
    def dtype(self) -> torch.dtype:
        """Of the states."""
        dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        return dtype

    def packed(self, indices: Sequence[int], pin: bool = False) -> Packed:
        """These sequences, one after the other; in page-locked memory if asked for."""
        rows = self.manifest.row
        found = [(self._load(self._name(index)).result(), rows[index]) for index in indices]
        tokens = [segment.tokens(row) for segment, row in found]
        ids = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in tokens)])
        mask = np.concatenate([np.zeros(0, np.bool_), *(mask != 0 for _, mask in tokens)])
        none = torch.empty(0, self.manifest.hidden_size, dtype=self.dtype)
        states = _together([none, *(segment.states(row) for segment, row in found)], pin)
        lengths = [len(ids) for ids, _ in tokens]
        packed = Packed.of(torch.from_numpy(ids), torch.from_numpy(mask), lengths, {LAST: states})
        return packed.pin() if pin else packed

    def order(self, seed: int, epoch: int) -> list[int]:
        """All sequences, shuffled: segments first, then sequences within a window of WINDOW segments."""
        generator = np.random.default_rng([seed, epoch])
        place = np.empty(len(self.manifest.segments), np.int64)
        place[generator.permutation(len(place))] = np.arange(len(place))
        window = place[np.asarray(self.manifest.segment, np.int64)] // WINDOW
        return [int(i) for i in np.lexsort((generator.random(len(window)), window))]

    def share(self, batch: Sequence[int], rank: int, world: int) -> list[int]:
        """One worker's part of a batch: all parts together are the batch, whatever the number of workers.

        Sequences of one segment stay together, so that a worker decodes but a part of a window's segments.
        """
        ordered = sorted(batch, key=lambda index: (self.manifest.segment[index], index))
        return ordered[len(ordered) * rank // world : len(ordered) * (rank + 1) // world]

    def batches(self, parts: Iterable[Sequence[int]], pin: bool = False) -> Iterator[Packed]:
        """The sequences of each part (by index), with segments decoded ahead.

        Raises:
            DamagedError: when a part that needs a damaged segment is reached.
        """
        for part in self._decoded_ahead(parts):
            yield self.packed(part, pin)

    def sequences(self, indices: Iterable[int]) -> Iterator[tuple[int, Packed]]:
        """Sequences one by one, in the order of the store, so that each segment is decoded once and ahead.

        Raises:
            DamagedError: when a sequence of a damaged segment is reached.
        """
        place = self.manifest.segment, self.manifest.row
        ordered = sorted(indices, key=lambda index: (place[0][index], place[1][index]))
        for (index,) in self._decoded_ahead([index] for index in ordered):
            yield index, self.packed([index])

    def _decoded_ahead(self, parts: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
        """The parts themselves, while what they and the next ones need is decoded."""
        source = iter(parts)
        waiting: deque[tuple[Sequence[int], set[str]]] = deque()
        needed: Counter[str] = Counter()
        while True:
            while not waiting or (len(needed) < WINDOW + AHEAD and len(waiting) < LOOK_AHEAD):
                if (part := next(source, None)) is None:
                    break
                names = {self._name(index) for index in part}
                waiting.append((part, names))
                needed.update(names)
                for name in sorted(names):
                    self._load(name, needed)
            if not waiting:
                return
            part, names = waiting.popleft()
            yield part
            needed -= Counter(names)

    def token_counts(self, prompts: bool = False) -> NDArray[np.int64]:
        """How often each token [V] is supervised in the split, or with `prompts` how often it occurs at all; reads no
        states."""
        counts = np.zeros(self.manifest.vocab_size, np.int64)
        rows: dict[int, list[int]] = {}
        for segment, row in zip(self.manifest.segment, self.manifest.row, strict=True):
            rows.setdefault(segment, []).append(row)
        for segment, used in rows.items():
            arrays, _ = self.collection.read(self.manifest.segments[segment], ("ids", "mask", "token_offsets"))
            for row in used:
                tokens = slice(*arrays["token_offsets"][row : row + 2])
                wanted = (arrays["mask"][tokens] != 0) | prompts
                counts += np.bincount(arrays["ids"][tokens][wanted], minlength=len(counts))
        return counts

    def _name(self, index: int) -> str:
        return self.manifest.segments[self.manifest.segment[index]]

    def _load(self, name: str, needed: Counter[str] | None = None) -> Future[_Segment]:
        """The segment, being decoded or decoded; makes room by dropping those used longest ago and not needed."""
        with self._lock:
            if name not in self._segments:
                self._make_room(needed or Counter())
                self._segments[name] = self._pool.submit(self._decode, name)
            self._segments.move_to_end(name)
            return self._segments[name]

    def _decode(self, name: str) -> _Segment:
        arrays, attributes = self.collection.read(name)
        return _Segment(arrays, self.dtype, CODECS[attributes["codec"]])

    def _make_room(self, needed: Counter[str]) -> None:
        done = {n: f.result().bytes for n, f in self._segments.items() if f.done() and f.exception() is None}
        total = sum(done.values())
        for name in [n for n in done if n not in needed][:-1]:
            if total <= self._memory:
                break
            total -= done[name]
            del self._segments[name]


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

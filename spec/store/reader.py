"""Cached features as training and acceptance read them: positions with their states and the tokens around them."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from spec.store import features
from spec.store.collection import Collection
from spec.store.manifest import Manifest
from spec.store.segment import StoreError

WINDOW = 8
"""Segments that are shuffled together: an epoch reads each segment once, and this many are in memory."""

T = TypeVar("T")


@dataclass(frozen=True)
class CachedSequence:
    """One cached sequence.

    Attributes:
        states: [P, d], the base's states at `positions`.
        positions: [P], the t of each state.
        ids: [T] tokens.
        mask: [T], 1 where a token is supervised.
    """

    states: torch.Tensor
    positions: NDArray[np.int64]
    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]


@dataclass(frozen=True)
class Positions:
    """What heads train and draft from; row p belongs to a position t.

    Attributes:
        states: [P, d], h_t.
        tokens: [P, n + 1], x_{t+1} .. x_{t+1+n}: column i is the input of head i, column i + 1 its target. Past the
            end of a sequence it holds zeros.
        valid: [P, n], whether head i trains here: x_{t+1} .. x_{t+2+i} all lie in one supervised span.
    """

    states: torch.Tensor
    tokens: torch.Tensor
    valid: torch.Tensor

    def to(self, device: torch.device) -> Positions:
        """The same on a device; the copy from pinned memory does not wait."""
        return Positions(*(x.to(device, non_blocking=True) for x in (self.states, self.tokens, self.valid)))

    def pin(self) -> Positions:
        """The same in page-locked memory."""
        return Positions(self.states.pin_memory(), self.tokens.pin_memory(), self.valid.pin_memory())


def to_positions(
    sequences: Sequence[CachedSequence], n_predict: int, hidden_size: int, dtype: torch.dtype
) -> Positions:
    """The positions of several sequences, one after the other."""
    states = torch.cat([torch.empty(0, hidden_size, dtype=dtype), *(s.states for s in sequences)])
    tokens = [np.empty((0, n_predict + 1), np.int32)]
    valid = [np.empty((0, n_predict), np.bool_)]
    for sequence in sequences:
        around = sequence.positions[:, None] + np.arange(1, n_predict + 2)
        inside = around < len(sequence.ids)
        around[~inside] = 0
        tokens.append(np.where(inside, sequence.ids[around], 0))
        supervised = inside & (sequence.mask[around] != 0)
        valid.append(np.logical_and.accumulate(supervised, axis=1)[:, 1:])
    return Positions(states, torch.from_numpy(np.concatenate(tokens)).long(), torch.from_numpy(np.concatenate(valid)))


class FeatureReader:
    """Reads the sequences of one split from the store; every chunk's checksum is checked.

    Args:
        manifest: the split.
        store: the store's root.

    Raises:
        StoreError: the store lacks a segment, or holds another identity than the manifest names.
    """

    def __init__(self, manifest: Manifest, store: Path) -> None:
        self.manifest = manifest
        self.collection = Collection(store, "features", manifest.identity)
        self._segments: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()
        records = self.collection.records()
        for name, digest in zip(manifest.segments, manifest.digests, strict=True):
            if name not in records:
                raise StoreError(
                    f"segment {name} is not in {self.collection.folder}; run the cache stage (it computes only what is "
                    "missing), or point features.store to the store that the manifest was made with"
                )
            if records[name].digest != digest:
                raise StoreError(
                    f"segment {name} in {self.collection.folder} has the digest {records[name].digest}, and the "
                    f"manifest names {digest}; delete its folder and run the cache stage again"
                )

    def __len__(self) -> int:
        return len(self.manifest)

    @property
    def dtype(self) -> torch.dtype:
        """Of the states."""
        dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        return dtype

    def sequence(self, index: int) -> CachedSequence:
        """The sequence at this place in the data's order."""
        arrays = self._segment(self.manifest.segments[self.manifest.segment[index]])
        row = self.manifest.row[index]
        tokens = slice(*arrays["token_offsets"][row : row + 2])
        states = slice(*arrays["state_offsets"][row : row + 2])
        mask = arrays["mask"][tokens]
        return CachedSequence(arrays["states"][states], features.kept_positions(mask), arrays["ids"][tokens], mask)

    def positions(self, indices: Sequence[int], n_predict: int) -> Positions:
        """The positions of several sequences."""
        sequences = [self.sequence(index) for index in indices]
        return to_positions(sequences, n_predict, self.manifest.hidden_size, self.dtype)

    def order(self, seed: int, epoch: int) -> list[int]:
        """All sequences, shuffled: segments first, then sequences within a window of WINDOW segments."""
        generator = np.random.default_rng([seed, epoch])
        place = np.empty(len(self.manifest.segments), np.int64)
        place[generator.permutation(len(place))] = np.arange(len(place))
        window = place[np.asarray(self.manifest.segment, np.int64)] // WINDOW
        return [int(i) for i in np.lexsort((generator.random(len(window)), window))]

    def _segment(self, name: str) -> dict[str, Any]:
        with self._lock:
            if name not in self._segments:
                while len(self._segments) > WINDOW + 1:
                    self._segments.popitem(last=False)
                arrays: dict[str, Any] = dict(self.collection.read(name))
                states = torch.from_numpy(arrays["states"])
                arrays["states"] = states if states.dtype == torch.float32 else states.view(self.dtype)
                self._segments[name] = arrays
            self._segments.move_to_end(name)
            return self._segments[name]


def prefetch(items: Iterable[T], depth: int = 4) -> Iterator[T]:
    """Make items on a thread, `depth` ahead; an exception there is raised here, and leaving early stops the thread."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(entry, timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, value = ready.get()
            if more:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stopped.set()
        thread.join()

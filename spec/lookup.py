"""Drafts from the training split's answers: an index of where tokens occurred in them, and of what followed.

It is a suffix array (SuffixDecoding, Oliaro et al. 2024, arXiv:2411.04975, keeps suffix trees): one int32 array [2, N].
Row 0 holds the tokens of all answers, with -1 before the first one and after each. Row 1 holds the places in row 0,
sorted by the bytes of at least DEPTH + 1 tokens that begin there, and then by themselves; so -1 sorts last.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from spec import files
from spec.corpus.sequences import Ids, Mask, spans
from spec.errors import SpecError

FILE = "lookup.npy"  # in a checkpoint's folder
DEPTH = 32  # tokens of the longest match
READ = 64  # occurrences are read at most; of more, evenly spaced ones
_TOKEN = np.dtype("<i4")
_END = b"\xff" * 4  # the bytes of -1


class LookupFileError(SpecError):
    """An index that cannot be used: says what was found, and that training writes it anew."""


@dataclass(frozen=True)
class Match:
    """The last `length` tokens occur with a token after them at the sorted places low .. high."""

    length: int
    low: int
    high: int
    token: int  # the one that follows most often; of several, the lowest
    count: int  # how often it follows
    total: int  # of how many occurrences that were read


def answers(ids: Ids, mask: Mask) -> list[tuple[int, ...]]:
    """The answers of a sequence as the index is to hold them: each run of supervised tokens is one."""
    return [tuple(ids[start:stop].tolist()) for start, stop in spans(mask)]


def write(path: Path, answers: Iterable[Sequence[int]], megabytes: float) -> str:
    """Write the index of as many of the first answers as fit into a file of this size; returns its SHA-256."""
    limit, held = (int(megabytes * 1e6) - 128) // 8, array("i", [-1])  # np.save writes 128 bytes before the array
    for answer in answers:
        if len(held) + len(answer) + 1 > limit:
            break
        held.extend(answer)
        held.append(-1)
    tokens = np.array(held, _TOKEN)
    with files.whole(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.stack([tokens, _sorted_places(tokens)]), allow_pickle=False)
    return files.digest_file(path)


def _sorted_places(tokens: Ids) -> Ids:
    """Row 1 for row 0, by prefix doubling (Manber and Myers 1993)."""
    _, rank = np.unique(tokens.view(">u4").astype(np.uint32), return_inverse=True)
    places = np.argsort(rank, kind="stable")
    for width in (1, 2, 4, 8, 16, DEPTH):  # before each step, rank and places tell so many tokens apart
        after = np.zeros_like(rank)
        after[:-width] = rank[width:] + 1
        key = (rank * (len(rank) + 1) + after)[places]
        order = np.argsort(key, kind="stable")
        places, key = places[order], key[order]
        rank[places] = np.cumsum(np.diff(key, prepend=key[0]) != 0)
    return places.astype(_TOKEN)


class Lookup:
    """An index that is open for reading; what is not looked at stays on the disk."""

    def __init__(self, rows: Ids) -> None:
        self._tokens, self._places = memoryview(rows[0]), memoryview(rows[1])  # faster than arrays, one by one
        self._bytes = self._tokens.cast("B")

    @classmethod
    def open(cls, path: Path, digest: str) -> Lookup:
        """Open the file that has this SHA-256; a LookupFileError where it is missing, damaged or another one."""
        found = files.digest_file(path) if path.is_file() else None
        if found != digest:
            state = (
                f"damaged, or belongs to another checkpoint: its SHA-256 is {found}, expected {digest}"
                if found
                else "missing"
            )
            raise LookupFileError(f"{path} is {state}. Train again to write it")
        return cls(np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray))

    def find(self, tail: Sequence[int]) -> Match | None:
        """The longest suffix of a tail, of at most DEPTH tokens, that occurs with a token after it."""
        last, found, low = np.asarray(tail[-DEPTH:], _TOKEN).tobytes(), 0, 0
        limit = len(last) // 4
        while found < limit:  # where a suffix occurs, all shorter ones do
            length = (found + limit + 1) // 2
            first, end = self._first(last[-4 * length :], 0, 0, len(self._places)), last[-4 * length :] + _END
            start = 4 * self._places[first]
            if self._bytes[start : start + len(end)].tobytes() < end:
                found, low = length, first
            else:
                limit = length - 1
        high = self._first(last[-4 * found :] + _END, 0, low, len(self._places))
        return self._match(found, low, high) if found else None

    def narrow(self, match: Match, token: int) -> Match | None:
        """The match of the tail with a token appended, one token longer; None if it does not occur, or
        would be longer than DEPTH."""
        if match.length == DEPTH:
            return None
        pattern = np.array(token, _TOKEN).tobytes()
        low = self._first(pattern, match.length, match.low, match.high)
        high = self._first(pattern + _END, match.length, low, match.high)
        return self._match(match.length + 1, low, high) if low < high else None

    def holds(self, wanted: Container[tuple[int, ...]]) -> bool:
        """Whether it holds one of these answers, whole."""
        tokens = np.asarray(self._tokens)
        ends = np.flatnonzero(tokens == -1).tolist()
        return any(tuple(tokens[before + 1 : end].tolist()) in wanted for before, end in pairwise(ends))

    def _first(self, pattern: bytes, skipped: int, low: int, high: int) -> int:
        """The first of the sorted places low .. high after which, `skipped` tokens on, the bytes are >= the pattern."""
        text, start, stop = self._bytes, 4 * skipped, 4 * skipped + len(pattern)
        return bisect_left(self._places, pattern, low, high, key=lambda p: text[4 * p + start : 4 * p + stop].tobytes())

    def _match(self, length: int, low: int, high: int) -> Match:
        step = -(-(high - low) // READ)
        counts = Counter([self._tokens[place + length] for place in self._places[low:high:step]])
        token = min(counts, key=lambda token: (-counts[token], token))
        return Match(length, low, high, token, counts[token], counts.total())

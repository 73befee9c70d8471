"""Where drafts come from: the speculator's heads, n-gram lookup, or one of the two by rule.

The offline walk (spec.acceptance) and decoding (spec.decoding) both draft by the Drafter below.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from spec.config import Decode
from spec.errors import SpecError

Source = Literal["none", "head", "ngram", "hybrid"]
"""What a step drafts: nothing (plain decoding), the heads' draft, an n-gram's continuation, or the latter where it
exists and else the heads'."""

NGRAM_LENGTH = 6
"""Tokens drafted by n-gram lookup where decode.draft_len is not set."""

T = TypeVar("T")


class DecodingError(SpecError):
    """A request that cannot be decoded: says what was found and what would fit."""


class NgramIndex:
    """Prompt lookup over a growing sequence (https://github.com/apoorvumang/prompt-lookup-decoding).

    The longest suffix of minimum..maximum tokens that occurred before, overlaps allowed, is continued as it was at
    its most recent earlier occurrence. Where that continuation meets the end of the sequence it goes on with the
    draft itself, as LZ77 copies do: a loop of any period is drafted to full length, and a draft is never short.
    (transformers' prompt lookup and vLLM's ngram proposer take the earliest occurrence and stop at the end.)

    A token costs O(maximum - minimum) dictionary entries and a draft O(maximum + length) time, however long the
    sequence is.

    Args:
        minimum: length of the shortest suffix looked up.
        maximum: of the longest.
        ids: the first tokens of the sequence.

    Raises:
        DecodingError: not 1 <= minimum <= maximum.
    """

    def __init__(self, minimum: int, maximum: int, ids: Iterable[int] = ()) -> None:
        if not 1 <= minimum <= maximum:
            raise DecodingError(f"n-grams of {minimum} to {maximum} tokens: expected 1 <= ngram_min <= ngram_max")
        self._sizes = range(maximum, minimum - 1, -1)
        self._ids: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # n-gram -> where the token behind its latest occurrence is
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Append tokens."""
        for token in ids:
            end = len(self._ids)  # an n-gram is entered once it has a continuation: the suffix never finds itself
            for n in self._sizes:
                if n <= end:
                    self._behind[tuple(self._ids[end - n :])] = end
            self._ids.append(int(token))

    def draft(self, length: int) -> list[int]:
        """The next `length` tokens by lookup; none where no suffix occurred before."""
        end = len(self._ids)
        for n in self._sizes:
            start = self._behind.get(tuple(self._ids[-n:]))
            if start is not None:
                return [self._ids[start + i % (end - start)] for i in range(length)]
        return []


class Drafter:
    """Says what each step drafts while one sequence grows.

    - head: decode.draft_len (default: n_predict) tokens from the heads.
    - ngram: decode.draft_len (default: NGRAM_LENGTH) tokens by lookup, where a suffix of decode.ngram_min to
      decode.ngram_max tokens occurred before; else nothing.
    - hybrid: the n-gram's draft where there is one, else the heads', of at most n_predict tokens.
    - none: nothing.

    Args:
        decode: lengths, and the source where none is given.
        n_predict: heads of the speculator; None where there is no speculator.
        source: instead of decode.draft.

    Raises:
        DecodingError: an unknown source; heads asked for without a speculator, or more of them than were trained.
    """

    def __init__(self, decode: Decode, n_predict: int | None, source: Source | None = None) -> None:
        source = source or decode.draft
        if source not in get_args(Source):
            raise DecodingError(f"draft is {source!r}, expected one of {', '.join(get_args(Source))}")
        self._ngrams: NgramIndex | None = None
        self._head_length = 0
        self._ngram_length = decode.draft_len or NGRAM_LENGTH
        if source in ("ngram", "hybrid"):
            self._ngrams = NgramIndex(decode.ngram_min, decode.ngram_max)
        if source in ("head", "hybrid"):
            if n_predict is None:
                raise DecodingError(f"draft is {source!r}, but there is no speculator: give one, or draft by 'ngram'")
            if source == "head" and (decode.draft_len or 0) > n_predict:
                raise DecodingError(
                    f"draft_len is {decode.draft_len}, but the speculator was trained with n_predict {n_predict}: "
                    f"set decode.draft_len to at most {n_predict}"
                )
            self._head_length = min(decode.draft_len or n_predict, n_predict)

    def extend(self, ids: Iterable[int]) -> None:
        """Append tokens of the prompt or of the answer."""
        if self._ngrams is not None:
            self._ngrams.extend(ids)

    def draft(self, limit: int, heads: Callable[[int], T]) -> list[int] | T:
        """Draft what follows the sequence so far.

        Args:
            limit: draft no more than this many tokens.
            heads: gives that many (at least one) of the heads' drafts; called only where they are wanted.
        """
        if self._ngrams is not None:
            found = self._ngrams.draft(min(limit, self._ngram_length))
            if found:
                return found
        length = min(limit, self._head_length)
        return heads(length) if length > 0 else []


def drafts_along(
    ids: Iterable[int],
    start: int,
    decode: Decode,
    heads: NDArray[np.int64] | None = None,
    source: Source | None = None,
) -> Iterator[list[int]]:
    """What decoding would draft behind each token of an answer, one draft a token.

    Args:
        ids: prompt and answer.
        start: where the answer begins.
        decode: as for Drafter.
        heads: [tokens of the answer, n_predict] the heads' drafts behind each of them; None without a speculator.
        source: instead of decode.draft.

    Raises:
        DecodingError: as Drafter.
    """
    tokens = [int(token) for token in ids]
    drafter = Drafter(decode, None if heads is None else heads.shape[1], source)
    drafter.extend(tokens[:start])
    rows: list[list[int]] = [[]] * (len(tokens) - start) if heads is None else heads.tolist()
    for token, row in zip(tokens[start:], rows, strict=True):
        drafter.extend([token])
        yield drafter.draft(sys.maxsize, partial(_first, row))


def _first(row: list[int], length: int) -> list[int]:
    return row[:length]

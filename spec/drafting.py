"""Where drafts come from: the speculator's heads, n-gram lookup, or one of the two by rule.

The offline walk (spec.acceptance) and decoding (spec.decoding) both draft by the Drafter below.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from spec.config import Decode
from spec.errors import SpecError
from spec.heads import SpeculatorConfig

Source = Literal["none", "head", "ngram", "hybrid"]
"""What a step drafts: nothing (plain decoding), the heads' draft, an n-gram's continuation, or the latter where its
match is strong and else the heads'. docs/decoding.md has the measurements behind the rule and the numbers below."""

PER_TOKEN = 3
"""Tokens that n-gram lookup drafts for each token of its match, where decode.draft_len is not set."""

STRONG = 2
"""Tokens of the shortest match that hybrid drafting prefers to the heads."""


class DecodingError(SpecError):
    """A request that cannot be decoded: says what was found and what would fit."""


class NgramIndex:
    """Prompt lookup over a growing sequence (https://github.com/apoorvumang/prompt-lookup-decoding).

    The longest suffix of minimum..maximum tokens that occurred before, overlaps allowed, is continued as it was at
    its most recent earlier occurrence. Where that continuation meets the end of the sequence it goes on with the
    draft itself, as LZ77 copies do: a loop of any period is drafted to full length, and a draft is never short.
    (transformers' prompt lookup and vLLM's ngram proposer take the earliest occurrence and stop at the end.) A draft
    costs O(maximum + length) time, however long the sequence is.
    """

    def __init__(self, minimum: int, maximum: int, ids: Iterable[int] = ()) -> None:
        self._sizes = range(maximum, minimum - 1, -1)
        self._ids: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> where the token after its latest occurrence is
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Append tokens."""
        for token in ids:
            end = len(self._ids)  # an n-gram is entered once it has a continuation: the suffix never finds itself
            for n in self._sizes:
                if n <= end:
                    self._next[tuple(self._ids[end - n :])] = end
            self._ids.append(int(token))

    def draft(
        self, length: int, per_token: int | None = None, after: Sequence[int] = (), minimum: int = 1
    ) -> list[int]:
        """The next `length` tokens by lookup; none where no suffix occurred before.

        There are at most per_token tokens for each one of the suffix, those of `after` included: tokens that are not in
        the index, and are taken for the sequence's last ones. `minimum` raises the index's own.
        """
        tail = [*self._ids[-self._sizes.start :], *after]
        for n in self._sizes:
            if n < minimum:
                break
            start = self._next.get(tuple(tail[-n:])) if n <= len(tail) else None
            if start is not None:
                count = length if per_token is None else min(length, per_token * n - len(after))
                period = len(self._ids) + len(after) - start
                copied = [*self._ids[start : start + count], *after]
                return [copied[i % period] for i in range(count)]
        return []


def head_length(decode: Decode, config: SpeculatorConfig) -> int:
    """How many tokens the heads draft at a step: decode.draft_len, n_predict by default, as many as they can."""
    wanted, longest = decode.draft_len or config.n_predict, config.longest_draft
    return wanted if longest is None else min(wanted, longest)


class Drafter:
    """Says what each step drafts while one sequence grows.

    - head: decode.draft_len (default: n_predict) tokens from the heads.
    - ngram: decode.draft_len tokens (default: PER_TOKEN for each token of the match) by lookup, where a suffix of
      decode.ngram_min to decode.ngram_max tokens occurred before; else nothing.
    - hybrid: the n-gram's draft where the match is of STRONG tokens or more; else the heads' (at most n_predict
      tokens), continued by lookup after the first of them where such a match exists (see follow).
    - none: nothing.

    n_predict is None where there is no speculator; `source` is taken instead of decode.draft.

    Raises:
        DecodingError: an unknown source; heads asked for without a speculator; decode asks for drafts of the heads
            alone, and for more than were trained.
    """

    def __init__(self, decode: Decode, n_predict: int | None, source: Source | None = None) -> None:
        source = source or decode.draft
        if source not in get_args(Source):
            raise DecodingError(f"draft is {source!r}, expected one of {', '.join(get_args(Source))}")
        self._ngrams = NgramIndex(decode.ngram_min, decode.ngram_max) if source in ("ngram", "hybrid") else None
        self._head_length = 0
        self._length = decode.draft_len or sys.maxsize
        self._per_token = None if decode.draft_len else PER_TOKEN
        self._strong = STRONG if source == "hybrid" else 1
        if source in ("head", "hybrid"):
            if n_predict is None:
                raise DecodingError(f"draft is {source!r}, but there is no speculator: give one, or draft by 'ngram'")
            if source == decode.draft == "head" and (decode.draft_len or 0) > n_predict:
                raise DecodingError(
                    f"draft_len is {decode.draft_len}, but the speculator was trained with n_predict {n_predict}: "
                    f"set decode.draft_len to at most {n_predict}"
                )
            self._head_length = min(decode.draft_len or n_predict, n_predict)
        self.uses_heads = self._head_length > 0
        self.follows = self._ngrams is not None and self.uses_heads  # whether `follow` may add to the heads' drafts

    def extend(self, ids: Iterable[int]) -> None:
        """Append tokens of the prompt or of the answer."""
        if self._ngrams is not None:
            self._ngrams.extend(ids)

    def draft(self, limit: int) -> list[int] | int:
        """At most `limit` tokens of what follows the sequence so far, or how many drafts of the heads are wanted, which
        `follow` continues."""
        if found := self._lookup(limit, ()):
            return found
        return max(min(limit, self._head_length), 0) or []

    def follow(self, limit: int, drafted: list[int]) -> list[int]:
        """The heads' drafts, continued by lookup after the first one that ends a strong match; limit as in draft."""
        for used in range(1, len(drafted) + 1 if self.follows else 0):
            if found := self._lookup(limit, drafted[:used]):
                return drafted[:used] + found
        return drafted

    def _lookup(self, limit: int, after: Sequence[int]) -> list[int]:
        length = min(limit, self._length) - len(after)
        if self._ngrams is None or length < 1:
            return []
        return self._ngrams.draft(length, self._per_token, after, self._strong)


def drafts_along(
    ids: Iterable[int],
    start: int,
    decode: Decode,
    heads: NDArray[np.int64] | None = None,
    source: Source | None = None,
) -> Iterator[list[int]]:
    """What decoding would draft after each token of an answer, which begins at `start` of ids, one draft a token.

    `heads` [tokens of the answer, n_predict] are the heads' drafts after each of them; None without a speculator.
    """
    tokens = [int(token) for token in ids]
    drafter = Drafter(decode, None if heads is None else heads.shape[1], source)
    drafter.extend(tokens[:start])
    rows: list[list[int]] = [[]] * (len(tokens) - start) if heads is None else heads.tolist()
    for token, row in zip(tokens[start:], rows, strict=True):
        drafter.extend([token])
        found = drafter.draft(sys.maxsize)
        yield drafter.follow(sys.maxsize, row[:found]) if isinstance(found, int) else found

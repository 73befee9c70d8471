"""Where drafts come from: a speculator's heads, n-grams of the sequence, n-grams of earlier answers, or all of them.

At each place of a draft the sources propose tokens, and the one most likely to be accepted is drafted (spec.mixer). A
draft ends where one more token is not worth its cost. The offline walk (spec.acceptance), decoding (spec.decoding) and
the proposer for vLLM (spec.serving.vllm) all draft by `complete`.
"""

from __future__ import annotations

import logging
import math
import operator
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from spec import mixer
from spec.config import Decode
from spec.errors import SpecError
from spec.heads import Choose, SpeculatorConfig
from spec.lookup import DEPTH, FILE, Lookup, Match
from spec.mixer import Signal, Weights

Source = Literal["none", "head", "ngram", "lookup", "hybrid"]
"""What a step drafts: nothing (plain decoding), the heads' draft of a fixed length, what n-grams of prompt and answer
propose, these and n-grams of the training split's answers, or all of them together."""

MOST = 32
"""Tokens of a draft, at most, where decode.draft_len is not set."""

DEEPEST = 8
"""At how many places of a draft heads without a limit of their own are asked, if n-grams draft, too."""

SURE = 0.9
"""Where lookup has a token with this chance of acceptance, the heads are not asked, nor later in that draft: they could
add little."""

DEFAULT: Mapping[str, Weights] = {
    "ngram": (-0.9, -0.9, 1.2, 1.2, *(0.0,) * 15),
    "lookup": (-2.1, 0.15, 1.2, 1.2, -0.5, -0.75, -0.35, -0.3, 0.85, 0.75, 0.4, 0.85, -0.45, -0.25, -0.35, *(0.0,) * 4),
    "hybrid": (
        *(-1.1, 0.35, 1.2, 1.2, -0.3, -0.7, -0.35, -0.4, 0.8, 0.65, 0.3, 0.35, -0.3, -0.2, -0.2),
        *(0.3, 0.65, -1.4, -0.15),
    ),
}
"""The mixer's weights by source if a checkpoint has none: about those that a fit on the embedded default gives."""


RECENT = 8
"""How many of an n-gram's latest occurrences its continuation is compared with."""


log = logging.getLogger(__name__)


class DecodingError(SpecError):
    """A request that cannot be decoded: says what was found and what would fit."""


class Ngrams:
    """Prompt lookup (https://github.com/apoorvumang/prompt-lookup-decoding) over a growing sequence."""

    def __init__(self, minimum: int, maximum: int) -> None:
        self._sizes = range(maximum, minimum - 1, -1)
        self.ids: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # n-gram -> where a token comes after it, ascending

    def extend(self, ids: Iterable[int]) -> None:
        """Append tokens."""
        for token in ids:
            end = len(self.ids)
            for n in self._sizes:
                if n <= end:
                    self._places.setdefault(tuple(self.ids[end - n :]), []).append(end)
            self.ids.append(int(token))

    def find(self, end: int, drafted: Sequence[int]) -> Signal | None:
        """What came after the latest earlier occurrence, within the first `end` tokens, of the longest suffix of these
        and the drafted tokens. How sure it is: the length of that suffix, and the token's share of its RECENT
        occurrences."""
        longest = self._sizes.start
        tail = [*self.ids[max(end - longest, 0) : end], *drafted][-longest:]
        for n in self._sizes:
            places = self._places.get(tuple(tail[-n:])) if n <= len(tail) else None
            if places and places[0] < end:
                stop = len(places) if places[-1] < end else bisect_left(places, end)
                followed = [self.ids[at] for at in places[max(stop - RECENT, 0) : stop]]
                token = followed[-1]
                return token, (math.log(n), mixer.share(followed.count(token), len(followed)))
        return None


@dataclass(frozen=True)
class Sources:
    """What drafts are made from, in a run.

    Raises:
        DecodingError: an unknown source; heads asked for without a speculator, or earlier answers without an index of
            them; decode asks for drafts of the heads alone, and for more than were trained.
    """

    decode: Decode
    source: Source
    head: SpeculatorConfig | None = None  # of the speculator, where there is one
    lookup: Lookup | None = None  # earlier answers

    def __post_init__(self) -> None:
        if self.source not in get_args(Source):
            raise DecodingError(f"draft is {self.source!r}, expected one of {', '.join(get_args(Source))}")
        if self.source == "lookup" and self.lookup is None:
            raise DecodingError(
                "draft is 'lookup', but there is no index of the training answers: train with decode.lookup_mb above "
                "0, or draft by 'ngram'"
            )
        for name, weights in ((self.head and self.head.mixer) or {}).items():
            if len(weights) != mixer.FEATURES or name not in DEFAULT:
                raise DecodingError(
                    f"config.json: mixer.{name} has {len(weights)} numbers, expected {mixer.FEATURES} for each of "
                    f"{', '.join(DEFAULT)}: it belongs to another release, train again"
                )
        if self.source not in ("head", "hybrid"):
            return
        if self.head is None:
            raise DecodingError(f"draft is {self.source!r}, but there is no speculator: give one, or draft by 'ngram'")
        wanted, longest = self.decode.draft_len or 0, self.head.longest_draft
        if self.source == self.decode.draft == "head" and longest is not None and wanted > longest:
            raise DecodingError(
                f"draft_len is {wanted}, but the speculator was trained with n_predict {longest}: set "
                f"decode.draft_len to at most {longest}"
            )

    @property
    def depth(self) -> int:
        """How many tokens the heads draft at most; if only heads draft, each draft is this long."""
        if self.head is None or self.source not in ("head", "hybrid"):
            return 0
        most = self.head.n_predict if self.source == "head" else DEEPEST
        return min(self.decode.draft_len or most, self.head.longest_draft or sys.maxsize)

    def weights_of(self, source: str) -> Weights:
        """The mixer's weights for tokens that a source proposes."""
        fitted = None if self.head is None else self.head.mixer
        return DEFAULT[source] if fitted is None else fitted.get(source, DEFAULT[source])


def every_source(decode: Decode, head: SpeculatorConfig, lookup: Lookup | None) -> dict[Source, Sources]:
    """All that can draft, by name."""
    names: tuple[Source, ...] = ("head", "ngram", "lookup", "hybrid")
    return {name: Sources(decode, name, head, lookup) for name in names if name != "lookup" or lookup is not None}


def sources_of(checkpoint: str | Path, config: SpeculatorConfig, decode: Decode) -> Sources:
    """What decode drafts from, with what a checkpoint's folder has."""
    return Sources(decode, decode.draft, config, open_lookup(checkpoint, config))


def open_lookup(checkpoint: str | Path, config: SpeculatorConfig) -> Lookup | None:
    """The index of training answers that a checkpoint has; the log says where it should have one."""
    path = Path(checkpoint) / FILE
    if config.lookup is None:
        return None
    if not path.is_file():
        log.warning("%s is missing: nothing is drafted from the training answers", path)
        return None
    return Lookup.open(path, config.lookup)


class Drafter:
    """One growing sequence, and what is drafted after it."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.ngrams: Ngrams | None = None
        if sources.source not in ("none", "head"):
            self.ngrams = Ngrams(sources.decode.ngram_min, sources.decode.ngram_max)

    def extend(self, ids: Iterable[int]) -> None:
        """Append tokens of the prompt or of the answer."""
        if self.ngrams is not None:
            self.ngrams.extend(ids)

    def draft(self, limit: int = MOST, end: int | None = None) -> Draft:
        """A draft of at most `limit` tokens after the first `end` tokens of the sequence, by default all of them;
        `complete` fills it."""
        return Draft(self, limit, end)


class Draft:
    """What is drafted after a place of a sequence, token by token."""

    def __init__(self, drafter: Drafter, limit: int, end: int | None) -> None:
        self.tokens: list[int] = []
        self.sources = sources = drafter.sources
        self.asks_heads = sources.depth > 0  # for the next token
        self.limit = min(limit, sources.decode.draft_len or MOST) if sources.source != "none" else 0
        self._ngrams = drafter.ngrams
        self._match: Match | None = None
        if self._ngrams is not None:
            self._end = len(self._ngrams.ids) if end is None else end
        # The chance that the base accepts all so far, and the tokens that the step then makes.
        self._reach, self._gain = 1.0, 1.0
        self._look()

    def signals(self, head: tuple[int, float] | None = None) -> list[Signal | None]:
        """What each source says of the next place. `head` is what the heads propose, with its probability."""
        return [*self._free, None if head is None else (head[0], (mixer.log_odds(head[1]),))]

    def step(self, head: tuple[int, float] | None = None) -> int | None:
        """Draft one token more and return it; None where none is worth it, which ends the draft."""
        best = self._best if head is None else self._likeliest(self.sources.source, head)
        if best is None or not self._worth(best[1]):
            self._close()
            return None
        self._reach *= best[1]
        self._gain += self._reach
        self.take(best[0])
        return best[0]

    def take(self, token: int) -> None:
        """Draft this token next."""
        self.tokens.append(token)
        if self._match is not None:
            assert self.sources.lookup is not None
            self._match = self.sources.lookup.narrow(self._match, token)
        self._look()

    def _look(self) -> None:
        """See what lookup proposes for the next place, and whether the heads are to be asked there."""
        self._free: list[Signal | None] = [None, None]
        self._best: tuple[int, float] | None = None
        if len(self.tokens) >= self.limit or (self._ngrams is not None and not self._worth(1.0)):
            self._close()
            return
        if self._ngrams is not None:
            self._free[0] = self._ngrams.find(self._end, self.tokens)
            if (lookup := self.sources.lookup) and self.sources.source != "ngram":
                if self._match is None:
                    tail = self._ngrams.ids[max(self._end - DEPTH, 0) : self._end]
                    self._match = lookup.find([*tail, *self.tokens])
                if (match := self._match) is not None:
                    share = mixer.share(match.count, match.total)
                    self._free[1] = match.token, (math.log(match.length), share, math.log(match.total))
            self._best = self._likeliest("ngram" if self.sources.source == "ngram" else "lookup")
        sure = self._best is not None and self._best[1] >= SURE
        self.asks_heads = self.asks_heads and len(self.tokens) < self.sources.depth and not sure

    def _likeliest(self, source: str, head: tuple[int, float] | None = None) -> tuple[int, float] | None:
        """The token that is most likely accepted, and its chance."""
        chances = mixer.chances(self.sources.weights_of(source), self.signals(head))
        return max(chances.items(), default=None, key=operator.itemgetter(1))

    def _worth(self, chance: float) -> bool:
        """Whether a token with this chance adds more to the tokens of a step than to its time, both as a share."""
        cost = self.sources.decode.token_cost
        return self._reach * chance * (1 + cost * len(self.tokens)) > cost * self._gain

    def _close(self) -> None:
        self.limit, self.asks_heads, self._best = len(self.tokens), False, None


Run = Callable[[int, Choose | None], Tensor]
"""Drafts at most n tokens with the heads, for each of M places: Speculator.draft_along with all but its last two
arguments."""


def complete(drafts: Sequence[Draft], run: Run | None = None) -> None:
    """Fill drafts, all of the same sources: with the heads as long as one asks for them, and then with n-grams."""
    if run is not None and any(draft.asks_heads for draft in drafts):
        depth = min(drafts[0].sources.depth, max(draft.limit for draft in drafts))
        if drafts[0].sources.source == "head":
            for draft, row in zip(drafts, run(depth, None).tolist(), strict=True):
                draft.tokens = row[: draft.limit]
            return

        def choose(tokens: Tensor, probabilities: Tensor) -> Tensor | None:
            chosen = tokens.tolist()
            for i, (draft, token, p) in enumerate(zip(drafts, chosen, probabilities.tolist(), strict=True)):
                drafted = draft.step((token, p)) if draft.asks_heads else None
                chosen[i] = token if drafted is None else drafted  # what a draft that has ended reads does not matter
            return tokens.new_tensor(chosen) if any(draft.asks_heads for draft in drafts) else None

        run(depth, choose)
    for draft in drafts:
        while draft.step() is not None:
            pass

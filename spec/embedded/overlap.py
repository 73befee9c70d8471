"""Near-duplicates: what keeps the evaluation sets out of training, and val out of train."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class Overlap:
    """Recognizes texts that repeat one of a set of texts.

    Texts are compared as words in lower case, with every number alike. A text repeats another when they share eight
    words in a row, or when the cosine of their sets of words, weighted by rarity in the set, is 0.5 or more.
    """

    run_length = 8
    least_cosine = 0.5

    def __init__(self, texts: Sequence[str]) -> None:
        words = [found for text in texts if (found := _words(text))]
        self._runs = {run for text in words for run in _runs(text, self.run_length)}
        self._texts_with = Counter(word for text in words for word in set(text))
        self._row = {word: row for row, word in enumerate(sorted(self._texts_with))}
        self._total = len(words)
        self._weights = np.zeros((len(self._row), len(words)), np.float32)  # [words, texts]
        for column, text in enumerate(words):
            for word in set(text):
                self._weights[self._row[word], column] = self._weight(word)
        self._lengths = np.sqrt(self._weights.sum(axis=0))  # [texts]

    def repeats(self, text: str) -> bool:
        """Whether the text repeats one of the set."""
        words = _words(text)
        if any(run in self._runs for run in _runs(words, self.run_length)):
            return True
        known = sorted(self._row[word] for word in set(words) if word in self._row)
        if not known:
            return False
        length = math.sqrt(sum(sorted(self._weight(word) for word in set(words))))
        cosines = self._weights[known].sum(axis=0) / (self._lengths * length)
        return bool(cosines.max() >= self.least_cosine)

    def repeats_any(self, texts: Iterable[str]) -> bool:
        """Whether one of some texts repeats one of the set."""
        return any(self.repeats(text) for text in texts)

    def _weight(self, word: str) -> float:
        """Squared inverse document frequency."""
        return math.log1p(self._total / self._texts_with.get(word, 1)) ** 2


def _words(text: str) -> tuple[str, ...]:
    return tuple("0" if word.isdigit() else word for word in re.findall(r"[^\W_]+", text.lower()))


def _runs(words: tuple[str, ...], length: int) -> Iterator[tuple[str, ...]]:
    return (words[start : start + length] for start in range(len(words) - length + 1))

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec.config import Decode
from spec.drafting import PER_TOKEN, STRONG, DecodingError, Drafter, NgramIndex, Source, drafts_along

ids = st.lists(st.integers(0, 3), max_size=40)


def by_definition(tokens: list[int], minimum: int, maximum: int, length: int) -> list[int]:
    """The longest suffix's latest earlier occurrence, found by looking everywhere, continued token by token."""
    for n in range(maximum, minimum - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[len(tokens) - n :]:
                grown = list(tokens)
                for i in range(length):
                    grown.append(grown[start + n + i])
                return grown[len(tokens) :]
    return []


@given(ids, st.integers(1, 4), st.integers(0, 4), st.integers(0, 9))
def test_ngram_draft_is_its_definition(tokens: list[int], minimum: int, more: int, length: int) -> None:
    expected = by_definition(tokens, minimum, minimum + more, length)
    for ids in (tokens, np.array(tokens, np.int32)):
        assert NgramIndex(minimum, minimum + more, ids).draft(length) == expected


@given(ids, st.lists(st.integers(0, 3), max_size=3), st.integers(1, 3), st.integers(0, 4), st.integers(1, 4))
def test_a_draft_after_tokens_that_are_drafted_themselves(
    tokens: list[int], after: list[int], minimum: int, more: int, per_token: int
) -> None:
    """As though the sequence held them, but for occurrences that end among them."""
    index = NgramIndex(1, minimum + more, tokens)
    found = index.draft(9, per_token, after, minimum)
    whole = tokens + after
    for n in range(minimum + more, minimum - 1, -1):
        ends = [end for end in range(n, len(tokens)) if whole[end - n : end] == whole[len(whole) - n :]]
        if ends and n <= len(whole):
            grown = list(whole)
            for i in range(min(9, per_token * n - len(after))):
                grown.append(grown[ends[-1] + i])
            assert found == grown[len(whole) :]
            return
    assert found == []


def drafted(drafter: Drafter, limit: int, heads: Sequence[int]) -> list[int]:
    """The whole draft of a step, from heads that draft these."""
    found = drafter.draft(limit)
    return drafter.follow(limit, list(heads[:found])) if isinstance(found, int) else found


HEADS = [100, 101, 102]


@pytest.mark.parametrize(
    ("source", "draft_len", "seen", "limit", "expected"),
    [
        ("none", None, [1, 1, 1], 9, []),
        ("head", None, [1, 1, 1], 9, HEADS),
        ("head", 2, [1, 1, 1], 9, HEADS[:2]),
        ("head", None, [1, 1, 1], 1, HEADS[:1]),
        ("head", None, [1, 1, 1], 0, []),
        ("head", None, [5, 100, 6, 7, 5], 9, HEADS),
        ("ngram", None, [1, 1, 1], 9, [1] * 2 * PER_TOKEN),  # a match of two tokens
        ("ngram", None, [7, 8, 7], 9, [8, 7, 8]),  # of one
        ("ngram", 8, [1, 1, 1], 9, [1] * 8),
        ("ngram", None, [1, 1, 1], 2, [1, 1]),
        ("ngram", None, [1, 2, 3], 9, []),
        ("hybrid", None, [1, 1, 1], 9, [1] * 2 * PER_TOKEN),
        ("hybrid", None, [1, 2, 3], 9, HEADS),
        ("hybrid", None, [7, 8, 7], 9, HEADS),  # a match of one token is weak
        ("hybrid", 8, [1, 2, 3], 9, HEADS),
        ("hybrid", 2, [1, 2, 3], 9, HEADS[:2]),
        ("hybrid", None, [1, 1, 1], 0, []),
        ("hybrid", None, [1, 2, 3], 0, []),
        ("hybrid", None, [5, 100, 6, 7, 5], 9, [100, 6, 7, 5, 100, 6]),  # lookup goes on after 5 100: 3 x 2 tokens
        ("hybrid", 4, [5, 100, 6, 7, 5], 9, [100, 6, 7, 5]),
        ("hybrid", 2, [5, 100, 6, 7, 5], 9, [100, 6]),
        ("hybrid", 1, [5, 100, 6, 7, 5], 9, [100]),
        ("hybrid", None, [5, 100, 6, 7, 5], 3, [100, 6, 7]),
        ("hybrid", None, [100, 101, 9, 5], 9, [100, 101, 9, 5, 100, 101]),  # after the second
        ("hybrid", None, [101, 9, 5], 9, HEADS),  # one token is no strong match
    ],
)
def test_what_a_step_drafts(
    source: Source, draft_len: int | None, seen: list[int], limit: int, expected: list[int]
) -> None:
    assert STRONG == 2
    drafter = Drafter(Decode(ngram_min=1, ngram_max=4, draft_len=draft_len), n_predict=3, source=source)
    drafter.extend(seen)
    assert drafted(drafter, limit, HEADS) == expected


@settings(max_examples=100)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=20), st.integers(1, 9))
def test_a_shorter_draft_is_the_beginning_of_a_longer_one(tokens: list[int], length: int) -> None:
    """So that one walk tells every draft length (acceptance.tokens_per_step_by_length)."""
    for source in ("ngram", "hybrid"):
        drafts = []
        for asked in (length, 10):
            drafter = Drafter(Decode(ngram_min=1, draft_len=asked), 3, source)
            drafter.extend(tokens)
            drafts.append(drafted(drafter, 99, [0, 1, 2]))
        assert drafts[0] == drafts[1][:length]


def test_sources_and_heads_that_are_not_there_are_refused() -> None:
    with pytest.raises(DecodingError, match="'heads', expected one of none, head"):
        Drafter(Decode(), 3, "heads")  # type: ignore[arg-type]
    for source in ("head", "hybrid"):
        with pytest.raises(DecodingError, match="no speculator"):
            Drafter(Decode(draft=source), None)
    with pytest.raises(DecodingError, match=r"draft_len is 4.*n_predict 3"):
        Drafter(Decode(draft="head", draft_len=4), 3)
    heads_of_hybrid = Drafter(Decode(draft="hybrid", draft_len=4), 3, "head")  # as evaluate measures them
    assert heads_of_hybrid.draft(9) == 3


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 2), min_size=2, max_size=20),
    st.data(),
    st.sampled_from(["none", "head", "ngram", "hybrid"]),
)
def test_drafts_along_an_answer_are_those_of_a_drafter_that_reads_it(
    tokens: list[int], data: st.DataObject, source: Source
) -> None:
    start = data.draw(st.integers(1, len(tokens) - 1))
    decode = Decode(ngram_min=2, ngram_max=3)
    rows = data.draw(st.sampled_from([10, 0])) + np.arange((len(tokens) - start) * 3).reshape(-1, 3)
    expected = []
    for j, row in enumerate(rows):
        drafter = Drafter(decode, 3, source)
        drafter.extend(tokens[: start + j + 1])
        expected.append(drafted(drafter, 99, row.tolist()))
    assert list(drafts_along(np.array(tokens), start, decode, rows, source)) == expected

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spec import lookup
from spec.lookup import DEPTH, READ, Lookup, LookupFileError, Match

token = st.sampled_from([0, 1, 256])  # their order is not that of their bytes
short = st.lists(token, max_size=12)
answer = short | st.builds(lambda token, times, rest: [token] * times + rest, token, st.integers(12, 40), short)
answers = st.lists(answer, max_size=6)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lookup") / lookup.FILE


def opened(path: Path, held: Sequence[Sequence[int]]) -> Lookup:
    return Lookup.open(path, lookup.write(path, held, 1))


def followers(held: list[list[int]], tail: list[int]) -> tuple[int, list[int]]:
    """The length of the longest suffix that some answer continues, and all its continuations, found by looking
    everywhere."""
    for n in range(min(DEPTH, len(tail)), 0, -1):
        suffix = tail[len(tail) - n :]
        if found := [each[i + n] for each in held for i in range(len(each) - n) if each[i : i + n] == suffix]:
            return n, found
    return 0, []


def late(length: int) -> list[list[int]]:
    """Answers that differ after so many tokens, in another order than the sorted one."""
    return [[0] * length + rest for rest in ([], [256, 1], [1], [256])]


@given(answers, answer, st.integers(0, 9), token)
@example(late(20), [0] * 20, 9, 1)
@example(late(DEPTH), [0] * DEPTH, 9, 1)
def test_a_match_is_its_definition_and_narrows_to_the_longer_one(
    path: Path, held: list[list[int]], tail: list[int], copied: int, following: int
) -> None:
    tail = tail + held[copied] if copied < len(held) else tail
    index = opened(path, held)
    match, longer = index.find(tail), index.find([*tail, following])
    length, found = followers(held, tail)
    if match is None:
        assert length == 0
        return
    assert (match.length, match.high - match.low) == (length, len(found))
    if len(found) <= READ:
        counts = Counter(found)
        best = min(token for token in counts if counts[token] == max(counts.values()))
        assert (match.token, match.count, match.total) == (best, counts[best], len(found))
    expected = longer if longer is not None and longer.length == match.length + 1 else None
    assert index.narrow(match, following) == expected


def test_of_many_occurrences_a_part_is_read_from_the_whole_range(path: Path) -> None:
    index = opened(path, [[5, 6 + (i % 4 > 0)] for i in range(100 * READ)])
    assert index.find(np.array([5])) == Match(1, 0, 100 * READ, 7, READ * 3 // 4, READ)


@given(answers, st.integers(0, 1500))
def test_the_first_answers_that_fit_are_held(path: Path, held: list[list[int]], size: int) -> None:
    digest = lookup.write(path, held, size / 1e6)
    assert path.stat().st_size <= max(size, 136)
    tokens = np.load(path)[0].tolist()
    fitting = [n for n in range(len(held) + 1) if 136 + 8 * sum(len(each) + 1 for each in held[:n]) <= max(size, 136)]
    assert tokens == [-1, *(token for each in held[: fitting[-1]] for token in [*each, -1])]
    assert lookup.write(path, iter(held), size / 1e6) == digest


def test_another_file_is_refused(path: Path) -> None:
    held = [[1, 2, 3], [1, 2]]
    digest, other = lookup.write(path, held[:1], 1), lookup.write(path, held, 1)
    whole = path.read_bytes()
    for found, expected in ((whole, digest), (whole[:-4], other), (whole[:-1] + b"\x01", other), (b"", other)):
        path.write_bytes(found)
        with pytest.raises(LookupFileError, match=r"lookup.npy is damaged, or belongs to another.*Train again"):
            Lookup.open(path, expected)
    path.unlink()
    with pytest.raises(LookupFileError, match=r"lookup.npy is missing. Train again"):
        Lookup.open(path, other)


def test_answers_are_runs_of_supervised_tokens_and_held_whole(path: Path) -> None:
    ids, mask = np.arange(8, dtype=np.int32), np.array([1, 0, 1, 1, 0, 0, 1, 1], np.uint8)
    found = lookup.answers(ids, mask)
    assert found == [(0,), (2, 3), (6, 7)]
    index = opened(path, found)
    assert index.holds({(9,), (2, 3)})
    assert not index.holds({(2,), (3,), (2, 3, 6, 7), (6,)})

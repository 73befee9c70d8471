import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spec import lookup, mixer
from spec.config import Decode
from spec.drafting import DEEPEST, MOST, RECENT, DecodingError, Drafter, Ngrams, Source, Sources, complete
from spec.heads import Choose
from tests.spec.heads.reference import config, eagle3

ids = st.lists(st.integers(0, 3), max_size=40)
NOTHING = (0.0,) * mixer.FEATURES
CERTAIN = (20.0, *NOTHING[1:])  # whatever is proposed is accepted
LOOKUP: Any = None


def weights(**features: float) -> mixer.Weights:
    """All zero but for these."""
    names = ("one", "ngram", "ngram_length", "ngram_share", "no_ngram", "no_ngram_length", "no_ngram_share")
    return tuple(features.get(name, 0.0) for name in names) + NOTHING[7:]


def sources(source: Source, fitted: mixer.Weights = CERTAIN, index: Any = None, n: int = 3, **decode: Any) -> Sources:
    mixers = dict.fromkeys(("ngram", "lookup", "hybrid"), fitted)
    shape = config("sum_rnn", n_predict=n).model_copy(update={"mixer": mixers})
    return Sources(Decode(**{"ngram_min": 1, "ngram_max": 4, "token_cost": 0.01, **decode}), source, shape, index)


def heads(tokens: Sequence[int], p: float = 0.5, read: list[int] | None = None) -> Any:
    """Heads that draft these tokens, whatever they read."""

    def run(n: int, choose: Choose | None) -> Tensor:
        drafts = []
        for token in tokens[:n]:
            likeliest = torch.tensor([token])
            chosen = likeliest if choose is None else choose(likeliest, torch.tensor([p]))
            if chosen is None:
                break
            drafts.append(int(chosen))
        if read is not None:
            read.extend(drafts)
        return torch.tensor([drafts])

    return run


def drafted(what: Sources, seen: Sequence[int], limit: int = 99, run: Any = None) -> list[int]:
    drafter = Drafter(what)
    drafter.extend(seen)
    draft = drafter.draft(limit)
    complete([draft], run)
    return draft.tokens


@given(ids, st.lists(st.integers(0, 3), max_size=3), st.integers(1, 4), st.integers(0, 4), st.data())
def test_ngrams_are_found_by_their_definition(
    tokens: list[int], drafted: list[int], minimum: int, more: int, data: st.DataObject
) -> None:
    """The longest suffix's latest earlier occurrence, as though the sequence ended sooner, by looking everywhere."""
    end = data.draw(st.integers(0, len(tokens)))
    index = Ngrams(minimum, minimum + more)
    index.extend(tokens)
    tail, expected = tokens[:end] + drafted, None
    for n in range(minimum, min(minimum + more, len(tail)) + 1):
        after = [tokens[at] for at in range(n, end) if tokens[at - n : at] == tail[len(tail) - n :]][-RECENT:]
        if after:
            expected = after[-1], (math.log(n), mixer.share(after.count(after[-1]), len(after)))
    assert index.find(end, drafted) == expected


@pytest.mark.parametrize(
    ("source", "more", "seen", "limit", "expected"),
    [
        ("none", {}, [1, 1, 1], 9, []),
        ("head", {}, [1, 1, 1], 9, [100, 101, 102]),
        ("head", {"draft_len": 2}, [1, 1, 1], 9, [100, 101]),
        ("head", {}, [1, 1, 1], 1, [100]),
        ("ngram", {}, [1, 1, 1], 9, [1] * 9),
        ("ngram", {}, [7, 8, 7], 5, [8, 7, 8, 7, 8]),
        ("ngram", {"draft_len": 4}, [1, 1, 1], 9, [1] * 4),
        ("ngram", {}, [1, 2, 3], 9, []),
        ("ngram", {}, [1, 1], 99, [1] * MOST),
        ("hybrid", {}, [1, 1, 1], 9, [1] * 9),  # lookup is sure: the heads are not asked
        ("hybrid", {}, [1, 2, 3], 9, [100, 101, 102]),
        ("hybrid", {}, [5, 100, 6, 7, 5], 9, [100, 6, 7, 5, 100, 6, 7, 5, 100]),
        ("hybrid", {}, [101, 9, 5], 5, [100, 101, 9, 5]),  # lookup goes on after what the heads drafted
        ("hybrid", {"draft_len": 2}, [101, 9, 5], 5, [100, 101]),
        ("hybrid", {}, [1, 1, 1], 0, []),
    ],
)
def test_what_a_step_drafts(source: Source, more: Any, seen: list[int], limit: int, expected: list[int]) -> None:
    assert drafted(sources(source, **more), seen, limit, heads([100, 101, 102])) == expected


def test_the_heads_read_what_is_drafted_from_any_source() -> None:
    """After 5 came 6 before, which these weights believe rather than the heads; they are asked all the same."""
    read: list[int] = []
    better = weights(one=-1.0, ngram=2.0, no_ngram=-4.0)
    hybrid = sources("hybrid", better, token_cost=0.001)
    assert drafted(hybrid, [5, 6, 9, 5], 3, heads([100, 101, 102], read=read)) == [6, 9, 5]
    assert read == [6, 9]  # the third draft ends it: nothing is read after it


@given(ids, st.floats(-3, 3), st.floats(0.01, 0.5))
def test_a_draft_ends_where_one_more_is_not_worth_its_cost(seen: list[int], odds: float, cost: float) -> None:
    """Tokens for the time of a step, both with k drafted tokens: (1 + p + .. + p^k) / (1 + cost k)."""
    found = drafted(sources("ngram", weights(one=odds), token_cost=cost), seen)
    p = 1 / (1 + math.exp(-odds))
    rates = [sum(p**i for i in range(k + 1)) / (1 + cost * k) for k in range(MOST + 1)]
    assert len(found) == (rates.index(max(rates)) if drafted(sources("ngram"), seen) else 0)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=20), st.integers(1, 9), st.floats(-1, 3))
def test_a_shorter_draft_is_the_beginning_of_a_longer_one(seen: list[int], length: int, odds: float) -> None:
    """So that one walk tells every draft length (acceptance.tokens_per_step_by_length)."""
    for source in ("ngram", "hybrid"):
        what = sources(source, weights(one=odds), token_cost=0.05)  # type: ignore[arg-type]
        whole, short = (drafted(what, seen, limit, heads([0, 1, 2])) for limit in (99, length))
        assert short == whole[:length]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=20), st.data(), st.sampled_from(["ngram", "lookup"]))
def test_drafts_along_an_answer_are_those_of_its_reader(tokens: list[int], data: st.DataObject, source: Source) -> None:
    start = data.draw(st.integers(1, len(tokens) - 1))
    what = sources(source, weights(one=0.5, ngram_length=1.0, no_ngram=-1.0), index=LOOKUP)
    along = Drafter(what)
    along.extend(tokens)
    drafts = [along.draft(end=end) for end in range(start, len(tokens) + 1)]
    complete(drafts)
    assert [draft.tokens for draft in drafts] == [drafted(what, tokens[:end]) for end in range(start, len(tokens) + 1)]


@pytest.fixture(scope="module", autouse=True)
def _index(tmp_path_factory: pytest.TempPathFactory) -> None:
    global LOOKUP
    path = tmp_path_factory.mktemp("index") / lookup.FILE
    LOOKUP = lookup.Lookup.open(path, lookup.write(path, [[0, 1, 2, 0, 1, 1], [2, 2, 1]], 1.0))


def test_earlier_answers_are_gone_through_after_the_sequence_itself() -> None:
    what = partial(sources, "lookup", weights(one=1.0, ngram=1.0, no_ngram=-1.0), index=LOOKUP)
    assert drafted(what(), [9, 0], 3) == [1, 1][:1] + drafted(what(), [9, 0, 1], 2)
    assert drafted(what(), [0, 7, 0], 1) == [7]  # the sequence's own n-gram is likelier
    assert drafted(what(), [8, 9], 3) == []


def test_a_source_that_is_never_right_drafts_next_to_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    heads_say = torch.randint(2, (400,), generator=generator).tolist()
    ngrams = [(0, (math.log(1 + i % 8), 0.0)) for i in range(400)]
    rows = [mixer.features(0, [ngram, None, (said, (0.1,))]) for ngram, said in zip(ngrams, heads_say, strict=True)]
    right = torch.rand(len(rows), generator=generator).numpy() < 0.01
    fitted = mixer.fit(np.array(rows), right, NOTHING)
    for source in ("ngram", "hybrid"):
        assert drafted(sources(source, fitted, token_cost=0.04), [1, 1, 1, 1, 1, 1], 9, heads([1, 1, 1])) == []  # type: ignore[arg-type]


def test_sources_that_are_not_there_are_refused() -> None:
    shape = config("sum_rnn", n_predict=3)
    with pytest.raises(DecodingError, match="'heads', expected one of none, head"):
        Sources(Decode(), "heads", shape)  # type: ignore[arg-type]
    for source in ("head", "hybrid"):
        with pytest.raises(DecodingError, match="no speculator"):
            Sources(Decode(), source)  # type: ignore[arg-type]
    with pytest.raises(DecodingError, match="no index of the training answers"):
        Sources(Decode(), "lookup", shape)
    with pytest.raises(DecodingError, match=r"draft_len is 4.*n_predict 3"):
        Sources(Decode(draft="head", draft_len=4), "head", shape)
    with pytest.raises(DecodingError, match=r"mixer.ngram has 2 numbers, expected 19"):
        Sources(Decode(), "ngram", shape.model_copy(update={"mixer": {"ngram": (0.0, 1.0)}}))
    assert drafted(sources("head", token_cost=2.0), [1], run=heads([7, 8, 9])) == [7, 8, 9]
    assert Sources(Decode(draft="hybrid", draft_len=4), "head", shape).depth == 3  # as evaluate measures them
    layer = {"heads": 2, "kv_heads": 1, "head_dim": 6, "intermediate_size": 16}
    endless = eagle3(layer, 8)
    assert [Sources(Decode(), source, endless).depth for source in ("head", "hybrid", "ngram")] == [3, DEEPEST, 0]
    assert Sources(Decode(draft_len=5), "head", endless).depth == 5

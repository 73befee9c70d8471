"""Domains of any number and name, as tables and pictures show them."""

import numpy as np
import pytest

from spec import acceptance, evaluation
from spec.acceptance import Walk
from spec.drafting import Source
from spec.evaluation import SHOWN, Offline, Timed

SOURCES: tuple[Source, ...] = ("head", "ngram", "lookup", "hybrid")


def walk(domain: str, *accepted: int) -> Walk:
    return Walk(np.array(accepted), domain)


def measured(walks: list[Walk]) -> Offline:
    return Offline({}, dict.fromkeys(SOURCES, walks), [], {}, {})


def test_small_domains_are_pooled_step_by_step() -> None:
    """One of them has many steps and the other few: a mean of their means would be 2.5."""
    large = [walk(f"d{number:02}", 1) for number in range(SHOWN) for _ in range(2)]
    small = [walk("few", 2), walk("many", *[1] * 98, 0)]
    found = measured([*small, *large])
    groups = evaluation.largest(found)
    assert list(groups) == [*(f"d{number:02}" for number in range(SHOWN)), "others"]
    timed = {source: [Timed(each, 10, 1.0) for each in (*small, *large)] for source in ("none", *SOURCES)}
    row = evaluation.by_domain(found, timed, found.walks, "head", groups)["others"]
    assert row["answers"] == 2
    assert row["tokens_per_step"] == row["decode_tokens_per_step"] == acceptance.tokens_per_step(small) == 2.0
    assert row["speedup"] == 1.0


def test_what_could_be_taken_for_a_total_is_quoted() -> None:
    names = ["all", "others", "", " a", "a\nb", "'all'", "C++", "a/b", "$x$", "😀"]
    groups = evaluation.largest(measured([walk(name, 1) for name in names]))
    expected = ["'all'", "'others'", "''", "' a'", r"'a\nb'", "\"'all'\"", *names[6:]]
    assert groups == dict(zip(expected, ({name} for name in names), strict=True))


@pytest.mark.parametrize("count", [0, 1, SHOWN, SHOWN + 1, 300])
def test_a_table_has_a_dozen_rows_and_the_others(count: int) -> None:
    groups = evaluation.largest(measured([walk(str(number), 1) for number in range(count)]))
    assert len(groups) == min(count, SHOWN + 1)
    assert sum(map(len, groups.values())) == count

"""docs/bases.csv says what is true."""

import csv
from dataclasses import asdict

import pytest

from bench.bases import CSV, FAMILIES, check
from tests.workspace import REPOSITORY

WRITTEN = {row["family"]: row for row in csv.DictReader((REPOSITORY / CSV).read_text().splitlines())}


def test_every_family_has_a_row_in_which_all_is_well() -> None:
    assert list(WRITTEN) == list(FAMILIES)
    assert not [name for name, row in WRITTEN.items() if "NO" in row.values() or "unknown" in row.values()]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_says_what_is_found(family: str) -> None:
    assert asdict(check(family)) == WRITTEN[family]

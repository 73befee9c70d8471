"""The index from source rows to what is stored of them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec.corpus import TokenSequence
from spec.store import index
from spec.store.segment import StoreError


def row(ids: list[int], prompt: int, source: bytes) -> TokenSequence:
    return TokenSequence(np.asarray(ids, np.int32), np.zeros(len(ids), np.uint8), "a", min(prompt, len(ids)), source)


SOURCES = st.sampled_from([bytes(16), b"\0" * 15 + b"a", b"a" + b"\0" * 15])  # zeros at either end are part of it
IDS = st.lists(st.integers(0, 3), min_size=1, max_size=4)
ROWS = st.lists(st.builds(row, IDS, st.integers(0, 4), SOURCES), max_size=6)


@settings(max_examples=50)
@given(parts=st.lists(ROWS, max_size=3))
def test_rows_are_found_until_gone(tmp_path_factory: pytest.TempPathFactory, parts: list[list[TokenSequence]]) -> None:
    root = tmp_path_factory.mktemp("store")
    expected: dict[bytes, set[index.Start]] = {}
    for rows in parts:
        index.write(root, rows)
        for row in rows:
            expected.setdefault(row.source, set()).add(index.Start.of(row))
    everything = {row.source for rows in parts for row in rows}
    assert index.find(root, everything) == expected
    gone = set(sorted(everything)[:1])
    index.drop(root, gone)
    assert index.find(root, everything) == {source: starts for source, starts in expected.items() if source not in gone}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    index.write(tmp_path, [TokenSequence(np.zeros(2, np.int32), np.zeros(2, np.uint8), "a", 1, b"a" * 16)])
    (path,) = (tmp_path / index.FOLDER).iterdir()
    for content in (path.read_bytes()[:-1], b"", b"other"):
        path.write_bytes(content)
        with pytest.raises(StoreError, match=f"{path.name} is damaged"):
            index.find(tmp_path, {b"a" * 16})

"""Which files a split is read from."""

from __future__ import annotations

from pathlib import Path

import pytest

from spec import corpus
from spec.corpus import CorpusError

from .families import (
    save,
)


def test_list_files_takes_files_and_folders(tmp_path: Path) -> None:
    a, b = (save(tmp_path / "f" / name, [{"text": "a"}]) for name in ("b/x.parquet", "a.parquet"))
    save(tmp_path / "f" / ".hidden.parquet", [{"text": "a"}])
    c = save(tmp_path / "c.data", [{"text": "a"}])
    assert corpus.list_files([str(c), str(tmp_path / "f")]) == [c, b, a]


def test_list_files_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no data file is named"):
        corpus.list_files([])
    with pytest.raises(CorpusError, match=r"nowhere.parquet: no such file or folder"):
        corpus.list_files([str(tmp_path / "nowhere.parquet")])
    with pytest.raises(CorpusError, match=r"the folder has no \*.parquet file"):
        corpus.list_files([str(tmp_path)])

"""Token sequences and their file."""

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec import corpus
from spec.corpus import CorpusError, Report, TokenSequence

from .families import byte_level, save


@given(st.lists(st.integers(0, 1), max_size=20))
def test_spans_are_the_maximal_runs_of_ones(mask: list[int]) -> None:
    rebuilt = np.zeros(len(mask), dtype=np.uint8)
    found = corpus.spans(np.array(mask, dtype=np.uint8))
    for start, stop in found:
        assert start < stop
        rebuilt[start:stop] = 1
    assert rebuilt.tolist() == mask
    assert all(before[1] < after[0] for before, after in pairwise(found))


def test_write_and_read_give_the_same_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sequences = []
    for n in rng.integers(0, 40, 1500):
        ids, mask = rng.integers(0, 2**31, n, dtype=np.int32), rng.integers(0, 2, n, dtype=np.uint8)
        sequences.append(TokenSequence(ids, mask, f"d{n % 3}", n // 2, rng.bytes(16)))
    path = tmp_path / "new" / "x.parquet"
    assert corpus.write(path, iter(sequences)) == 1500
    back = corpus.read(path)
    assert [(s.ids.tolist(), s.mask.tolist(), s.domain, s.prompt_length, s.source) for s in back] == [
        (s.ids.tolist(), s.mask.tolist(), s.domain, s.prompt_length, s.source) for s in sequences
    ]
    assert back[0].ids.dtype == np.int32
    assert back[0].mask.dtype == np.uint8
    assert all(s.ids.flags.writeable for s in back)
    assert pq.read_schema(path).names == ["ids", "mask", "domain", "prompt_length", "source"]
    first = path.read_bytes()
    corpus.write(path, sequences)
    assert path.read_bytes() == first
    assert corpus.write(path, []) == 0
    assert corpus.read(path) == []


def test_a_file_says_what_it_was_made_with(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    sequences = [TokenSequence(np.arange(3, dtype=np.int32), np.ones(3, np.uint8), "d", 1)]
    origin = {"tokenizer": "0" * 64, "temperature": 0.5, "seed": None, "source": "bäse"}
    corpus.write(path, sequences, origin)
    assert corpus.read_origin(path) == origin
    assert len(corpus.read(path)) == 1
    corpus.write(path, [])
    assert corpus.read_origin(path) == {}
    assert corpus.read_origin(save(tmp_path / "q.parquet", [{"question": "a"}])) == {}


@pytest.mark.parametrize("read", [corpus.read, corpus.read_origin])
@pytest.mark.parametrize("content", [b"", b"PAR1 not really", b'{"question": "a"}\n'])
def test_what_is_no_parquet_file_is_refused(tmp_path: Path, content: bytes, read: Callable[[Path], object]) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(CorpusError, match=r"x.parquet: no such file; the stage that writes it has not run"):
        read(path)
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"x.parquet: not a readable parquet file"):
        read(path)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = save(tmp_path / "q.parquet", [{"question": "a"}] * 300 + [{"question": None}])
    out = tmp_path / "out" / "x.parquet"
    options = {"prompt_key": None, "response_key": None, "max_length": 99, "max_samples": 300, "need_answers": False}
    assert corpus.write(out, corpus.stream([path], byte_level(), **options, report=Report())) == 300
    before = out.read_bytes()
    options["max_samples"] = None
    with pytest.raises(CorpusError, match="row 300"):
        corpus.write(out, corpus.stream([path], byte_level(), **options, report=Report()))
    assert out.read_bytes() == before
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, r"found columns ids \(list<.*int32>\), domain \(string\).*expected ids"),
        ({"ids": pa.array([[1, 2]], pa.list_(pa.int64()))}, r"found columns ids \(list<.*int64>\)"),
        ({"mask": pa.array([[1]], pa.list_(pa.uint8()))}, "ids and mask differ in length"),
        ({"prompt_length": pa.array([3], pa.int32())}, "prompt_length 3 do not fit"),
        ({"domain": pa.array([None], pa.string())}, "it has nulls"),
    ],
)
def test_read_refuses_other_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    columns = {
        "ids": pa.array([[1, 2]], pa.list_(pa.int32())),
        "mask": pa.array([[0, 1]], pa.list_(pa.uint8())),
        "domain": pa.array(["d"]),
        "prompt_length": pa.array([1], pa.int32()),
        "source": pa.array([b""]),
    }
    columns = {name: column for name, column in {**columns, **change}.items() if column is not None}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match=message):
        corpus.read(tmp_path / "x.parquet")


def test_the_module_loads_without_torch() -> None:
    code = "import sys, spec.corpus; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

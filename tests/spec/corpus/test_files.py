"""Which files a split is read from."""

import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spec import corpus
from spec.corpus import CorpusError
from spec.corpus.files import domain_of
from spec.files import digest_file

from .families import save

HUB = ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"]
ANSWERS = {"train": HUB[:2], "val": HUB[2:3], "eval": HUB[3:], None: sorted(HUB)}


def test_list_files_takes_files_and_folders(tmp_path: Path) -> None:
    a, b = (save(tmp_path / "f" / name, [{"text": "a"}]) for name in ("b/x.parquet", "a.parquet"))
    save(tmp_path / "f" / ".hidden.parquet", [{"text": "a"}])
    c = save(tmp_path / "c.data", [{"text": "a"}])
    assert corpus.list_files([str(c), str(tmp_path / "f")]) == [c, b, a]


def test_list_files_names_what_is_missing(tmp_path: Path) -> None:
    for names in ([], [""]):
        with pytest.raises(CorpusError, match="no data file is named"):
            corpus.list_files(names)
    with pytest.raises(CorpusError, match=r"nowhere.parquet: no such file or folder"):
        corpus.list_files([str(tmp_path / "nowhere.parquet")])
    with pytest.raises(CorpusError, match=r"the folder has no \*.parquet file"):
        corpus.list_files([str(tmp_path)])


def folder_of(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (HUB, ANSWERS),
        ([*HUB, ".cache/train-1", ".ipynb_checkpoints/train-checkpoint"], ANSWERS),
        (["train/0000", "test/0000"], {"train": ["train/0000"], "eval": ["test/0000"]}),
        (["train", "dev", "eval"], {"train": ["train"], "val": ["dev"], "eval": ["eval"]}),
        (["train_sft-0", "test_sft-0"], {"train": ["train_sft-0"], "eval": ["test_sft-0"]}),
        (["test-0000", "test-0001"], {"train": ["test-0000", "test-0001"]}),
        (["part-0000", "trainers"], {"train": ["part-0000", "trainers"]}),
        (["maths-train", "v1.5.test"], {"train": ["maths-train"], "eval": ["v1.5.test"]}),
        (["split=train/0", "part-test/0"], {"train": ["split=train/0"], "eval": ["part-test/0"]}),
    ],
)
def test_of_a_folder_of_several_splits_each_takes_its_own(tmp_path: Path, names: list[str], expected: Any) -> None:
    folder_of(tmp_path, *names)
    for split, files in expected.items():
        found = corpus.list_files([str(tmp_path)], split=split)
        assert [path.relative_to(tmp_path).with_suffix("").as_posix() for path in found] == files


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["train", "test"], "val"),
        (["train", "test", "more"], "train"),
        (["train", "test", "eval"], "eval"),
        (["train", "validation", "dev"], "val"),
        (["test/train", "train/test"], "train"),
    ],
)
def test_a_folder_in_which_a_split_is_unclear_is_refused(tmp_path: Path, names: list[str], split: str) -> None:
    with pytest.raises(CorpusError, match=rf"{split} is unclear: found .*{names[-1]}.parquet.*data.{split}_files, or"):
        corpus.list_files([str(folder_of(tmp_path, *sorted(names)))], split=split)


def test_globs(tmp_path: Path) -> None:
    folder_of(tmp_path, "a/train-1", "a/train-0", "a/test-0", "train-2")
    assert [path.stem for path in corpus.list_files([f"{tmp_path}/a/train-*.parquet"])] == ["train-0", "train-1"]
    assert len(corpus.list_files([f"{tmp_path}/**/train-*.parquet"], split="eval")) == 3
    with pytest.raises(CorpusError, match=r"b-\*: no file matches this pattern"):
        corpus.list_files([f"{tmp_path}/b-*"])
    assert [path.stem for path in corpus.list_files([f"{tmp_path}/[ab]"], split="eval")] == ["test-0"]


def test_each_file_is_taken_once_and_links_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path, "a/x")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/linked").symlink_to(tmp_path / "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert corpus.list_files(["~/b", "~/b/", "~/a/x.parquet", "$HOME/*/*.parquet"]) == [tmp_path / "b/linked/x.parquet"]
    (tmp_path / "b/y.parquet").symlink_to(tmp_path / "nowhere")
    for name in ("b", "b/*.parquet"):
        with pytest.raises(CorpusError, match=r"y.parquet: a link to a file that is not there"):
            corpus.list_files([str(tmp_path / name)])


def as_arrow(questions: list[str]) -> bytes:
    table, sink = pa.table({"question": questions}), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", b'{"question": "a"}\n{"question": "b"}\n'),
        ("x.jsonl.gz", gzip.compress(b'{"question": "a"}\n{"question": "b"}\n', mtime=0)),
        ("x.json", b'[{"question": "a"}, {"question": "b"}]'),
        ("x.csv", b"question\na\nb\n"),
        ("x.arrow", as_arrow(["a", "b"])),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
@pytest.mark.parametrize("named", [True, False])
def test_other_formats_are_refused_with_a_conversion(tmp_path: Path, name: str, content: bytes, named: bool) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(CorpusError, match=r"data files are parquet; convert it with: python -c") as error:
        corpus.list_files([str(tmp_path / name if named else tmp_path)])
    command = str(error.value).partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", command], check=True)
    assert pq.read_table(tmp_path / "x.parquet").to_pylist() == [{"question": "a"}, {"question": "b"}]


@pytest.mark.parametrize(
    ("path", "domain"),
    [
        *(("train-00000-of-00003", "train"), ("part-0001", "part"), ("a/maths/0000", "maths"), ("gsm8k", "gsm8k")),
        *(("part-00000-3f2a9c-c000.snappy", "part"), ("aime-2024", "aime-2024"), ("chunk_12", "chunk")),
        *(("hard_2", "hard_2"), ("7", "a")),
    ],
)
def test_shards_of_one_file_are_one_domain(path: str, domain: str) -> None:
    assert domain_of(Path("a") / f"{path}.parquet") == domain


def test_a_file_in_two_splits_is_refused_under_any_name() -> None:
    corpus.check_apart({"train": {"a": "1", "b": "2"}, "val": {"c": "3"}, "eval": {"d": "4"}})
    with pytest.raises(CorpusError, match=r"b and d are the same file, in data.train_files and in data.eval_files"):
        corpus.check_apart({"train": {"a": "1", "b": "2"}, "val": {"c": "3"}, "eval": {"d": "2"}})
    with pytest.raises(CorpusError, match=r"a is in data.val_files and in data.eval_files"):
        corpus.check_apart({"train": {}, "val": {"a": "1"}, "eval": {"a": "1"}})


def test_empty_part_files_may_be_alike_in_two_splits(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"]})
    for split, rows in {"train": 0, "val": 0, "eval": 1, "other": 1}.items():
        pq.write_table(table.slice(0, rows), tmp_path / f"{split}.parquet")
    digests = {path.stem: {str(path): digest_file(path)} for path in tmp_path.iterdir()}
    corpus.check_apart({split: digests[split] for split in ("train", "val", "eval")})
    with pytest.raises(CorpusError, match="are the same file"):
        corpus.check_apart({split: digests[split] for split in ("train", "eval", "other")})

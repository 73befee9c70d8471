"""Which files a split is read from: paths, folders and globs -> parquet files, and the domain of a file."""

import glob
import os
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spec.corpus.sequences import CorpusError

NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "eval": ("test", "eval", "evaluation")}
"""The words in the names of each split's files, in a folder that holds several splits."""

_SPLIT = {name: split for split, names in NAMES.items() for name in names} | {"training": "train", "testing": "eval"}
# train-00000-of-00003, part-0001, part-00000-3f2a...-c000.snappy, chunk_12, x-00012
_SHARD = re.compile(r"[-_.]\d+[-_.]of[-_.]\d+.*|(?<![a-z])(part|shard|chunk)[-_.]?\d+.*|[-_.](0\d{2,}|\d{5,})$")
_CONVERT = {
    "jsonl": "import pyarrow.json as j, pyarrow.parquet as p; p.write_table(j.read_json({path!r}), {target!r})",
    "csv": "import pyarrow.csv as c, pyarrow.parquet as p; p.write_table(c.read_csv({path!r}), {target!r})",
    "arrow": "import pyarrow as a, pyarrow.parquet as p; "
    "p.write_table(a.ipc.open_stream(a.memory_map({path!r})).read_all(), {target!r})",
    "json": "import pandas; pandas.read_json({path!r}).to_parquet({target!r})",
}
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def list_files(paths: Sequence[str], *, split: str | None = None) -> list[Path]:
    """The parquet files that paths name, each of them once.

    A file stands for itself, a glob (`dir/train-*.parquet`, `**`) for the files that match, or else the folders, and
    a folder for every *.parquet below it, sorted; hidden files and folders are skipped. `~` and `$HOME` expand. Of a
    folder that holds several splits, only the files of `split` ("train", "val" or "eval") are taken.
    """
    if not paths or not all(map(str.strip, paths)):
        raise CorpusError("no data file is named: give a parquet file, a folder of them, or a list of both")
    files: dict[Path, Path] = {}
    for name in paths:
        for path in _find(Path(os.path.expandvars(name)).expanduser(), name, split):
            _check_format(path)
            files.setdefault(path.resolve(), path)
    return list(files.values())


def _find(path: Path, name: str, split: str | None) -> list[Path]:
    if path.is_dir():
        return _of_folder(path, split)
    if path.exists():
        return [path]
    if not glob.has_magic(name):
        raise CorpusError(
            f"{name}: no such file or folder (looked for {path.absolute()}). A data set of the hub is downloaded with: "
            "hf download OWNER/NAME --repo-type dataset --local-dir FOLDER"
        )
    found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 - Path.glob takes no absolute pattern
    if not found:
        raise CorpusError(f"{name}: no file matches this pattern")
    files = [match for match in found if not match.is_dir()]
    return files or [file for folder in found for file in _of_folder(folder, split)]


def domain_of(path: Path) -> str:
    """What rows of a file are counted under when they name no domain: its stem, the same for all shards of a file."""
    if path.stem.isdigit():
        return path.parent.name or path.stem
    return _SHARD.sub(r"\1", path.stem) or path.stem


def check_apart(splits: Mapping[str, Mapping[str, str]]) -> None:
    """Check that no file is in two splits, by the digest of each file by split and path; empty files may be alike."""
    for (first, ones), (second, others) in combinations(splits.items(), 2):
        paths = {digest: path for path, digest in ones.items()}
        for path, digest in others.items():
            if digest in paths and not _is_empty(Path(path)):
                same = f"{path} is" if path == paths[digest] else f"{paths[digest]} and {path} are the same file,"
                raise CorpusError(
                    f"{same} in data.{first}_files and in data.{second}_files: what trains or chooses the speculator "
                    "must not measure it. Give each split files of its own"
                )


def _is_empty(path: Path) -> bool:
    """Whether a file has no rows; one that cannot be read is refused by the stage that reads it."""
    try:
        return bool(pq.read_metadata(path).num_rows == 0)
    except (OSError, pa.ArrowException):
        return False


def _of_folder(folder: Path, split: str | None) -> list[Path]:
    # glob follows linked folders and passes over hidden ones
    names = sorted(map(Path, glob.glob("**", root_dir=folder, recursive=True)))  # noqa: PTH207 - as said
    found = [folder / name for name in names if not (folder / name).is_dir()]
    below = [path for path in found if path.suffix.lower() == ".parquet"]
    if not below:
        for path in found:
            if path.name not in _DESCRIPTIONS:
                _check_format(path)
        raise CorpusError(f"{folder}: the folder has no *.parquet file in it or below it")
    words = {  # the names of splits in the name of a file and of the folders on the way to it
        path: frozenset(_SPLIT) & {*re.findall("[a-z]+", str(path.relative_to(folder).with_suffix("")).lower())}
        for path in below
    }
    owners = {path: {_SPLIT[word] for word in words[path]} for path in below}
    if split is None or len(below) == 1 or len(set().union(*owners.values())) < 2:
        return below
    taken = [path for path in below if owners[path] == {split}]
    if any(len(owner) != 1 for owner in owners.values()) or len({words[path] for path in taken}) != 1:
        listed = [str(path.relative_to(folder)) for path in below]
        more = f" and {len(listed) - 12} more" if listed[12:] else ""
        raise CorpusError(
            f"{folder} holds files of several splits, and which are those of {split} is unclear: found "
            f"{', '.join(listed[:12])}{more}; looked for the word {' or '.join(NAMES[split])} in names. Name files "
            f"in data.{split}_files, or a glob such as {folder}/{NAMES[split][0]}-*.parquet"
        )
    return taken


def _check_format(path: Path) -> None:
    if not path.exists():
        raise CorpusError(f"{path}: a link to a file that is not there ({path.resolve()})")
    kind = re.sub(r"\.(gz|zst|bz2)$", "", path.name.lower()).rpartition(".")[2].replace("ndjson", "jsonl")
    if kind in _CONVERT:
        target = str(path.with_name(path.name.partition(".")[0] + ".parquet"))
        command = _CONVERT[kind].format(path=str(path), target=target)
        raise CorpusError(f'{path}: data files are parquet; convert it with: python -c "{command}"')

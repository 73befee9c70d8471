"""Which files a split is read from: paths, folders and globs -> parquet files, and the domain of a file."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from spec.corpus.sequences import CorpusError

NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "eval": ("test", "eval", "evaluation")}
"""How the files of each split begin, in a folder that holds several splits."""

_SPLIT = {name: split for split, names in NAMES.items() for name in names} | {"training": "train", "testing": "eval"}
_FIRST_WORD = re.compile("[a-z]+")
# train-00000-of-00003, part-0001, part-00000-3f2a...-c000.snappy, chunk_12, x-00012
_SHARD = re.compile(r"[-_.]\d+[-_.]of[-_.]\d+.*|(?<![a-z])(part|shard|chunk)[-_.]?\d+.*|[-_.](0\d{2,}|\d{5,})$")
_CONVERT = {
    "json": "import pandas; pandas.read_json({path!r}).to_parquet({target!r})",
    "jsonl": "import pyarrow.json as j, pyarrow.parquet as p; p.write_table(j.read_json({path!r}), {target!r})",
    "csv": "import pyarrow.csv as c, pyarrow.parquet as p; p.write_table(c.read_csv({path!r}), {target!r})",
}
_OTHER_FORMATS = {"json": "json", "jsonl": "jsonl", "ndjson": "jsonl", "csv": "csv"}


def list_files(paths: Sequence[str], *, split: str | None = None) -> list[Path]:
    """The parquet files that paths name.

    A file stands for itself, a glob (`dir/train-*.parquet`, `**`) for the files that match, and a folder for every
    *.parquet below it, sorted; hidden files and folders are skipped.

    Args:
        paths: files, folders and globs.
        split: "train", "val" or "eval". Of a folder that holds several splits, only the files of this one are taken.

    Raises:
        CorpusError: no path at all, a path that does not exist or matches nothing, a folder without parquet files or
            without some of this split, a file in another format.
    """
    if not paths:
        raise CorpusError("no data file is named: give a parquet file, a folder of them, or a list of both")
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            files += _of_folder(path, split)
        elif path.exists():
            files.append(path)
        elif glob.has_magic(name):
            found = [match for match in map(Path, sorted(glob.glob(name, recursive=True))) if match.is_file()]  # noqa: PTH207 - Path.glob takes no absolute pattern
            if not found:
                raise CorpusError(f"{name}: no file matches this pattern")
            files += found
        else:
            raise CorpusError(f"{path}: no such file or folder (looked for {path.absolute()})")
    for path in files:
        _check_format(path)
    return files


def domain_of(path: Path) -> str:
    """What rows of a file are counted under when they name no domain: its stem, the same for all shards of a file."""
    if path.stem.isdigit():
        return path.parent.name or path.stem
    return _SHARD.sub(r"\1", path.stem) or path.stem


def check_apart(splits: Mapping[str, Mapping[str, str]]) -> None:
    """Check that no file is in two splits.

    Args:
        splits: the digest of each file, by split and path.

    Raises:
        CorpusError: names a file that is, under whatever name.
    """
    for (first, ones), (second, others) in combinations(splits.items(), 2):
        paths = {digest: path for path, digest in ones.items()}
        for path, digest in others.items():
            if digest in paths:
                same = f"{path} is" if path == paths[digest] else f"{paths[digest]} and {path} are the same file,"
                raise CorpusError(
                    f"{same} in data.{first}_files and in data.{second}_files: what trains or chooses the speculator "
                    "must not measure it. Give each split files of its own"
                )


def _of_folder(folder: Path, split: str | None) -> list[Path]:
    visible = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    below = [path for path in visible if path.suffix == ".parquet"]
    if not below:
        for path in visible:
            _check_format(path)
        raise CorpusError(f"{folder}: the folder has no *.parquet file in it or below it")
    owners = {path: _split_of(path.relative_to(folder)) for path in below}
    if split is None or len({owner for owner in owners.values() if owner}) < 2:
        return below
    taken = [path for path, owner in owners.items() if owner == split]
    unclear = None in owners.values() or len({_first_word(path.relative_to(folder)) for path in taken}) != 1
    if unclear:
        names = [str(path.relative_to(folder)) for path in below]
        more = f" and {len(names) - 12} more" if names[12:] else ""
        raise CorpusError(
            f"{folder} holds files of several splits, and which are those of {split} is unclear: found "
            f"{', '.join(names[:12])}{more}; looked for names that begin with {' or '.join(NAMES[split])}. Name files "
            f"in data.{split}_files, or a glob such as {folder}/{NAMES[split][0]}-*.parquet"
        )
    return taken


def _first_word(path: Path) -> str | None:
    """The split's name with which a file, or else a folder on the way to it, begins."""
    for part in reversed(path.parts):
        word = _FIRST_WORD.match(part.lower())
        if word and word[0] in _SPLIT:
            return word[0]
    return None


def _split_of(path: Path) -> str | None:
    word = _first_word(path)
    return _SPLIT[word] if word else None


def _check_format(path: Path) -> None:
    name = path.name.lower().removesuffix(".gz")
    kind = _OTHER_FORMATS.get(name.rpartition(".")[2]) if "." in name else None
    if kind is not None:
        target = str(path.with_name(path.name.partition(".")[0] + ".parquet"))
        command = _CONVERT[kind].format(path=str(path), target=target)
        raise CorpusError(f'{path}: data files are parquet; convert it with: python -c "{command}"')

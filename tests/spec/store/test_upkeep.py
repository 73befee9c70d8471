"""Looking after a store: what is kept, what goes, and that nothing is left of what must be forgotten."""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec.corpus import TokenSequence
from spec.corpus.sequences import Ids
from spec.errors import SpecError
from spec.store import answers, index, segment, upkeep
from spec.store.codecs import NONE
from spec.store.collection import Collection
from spec.store.locks import in_use
from spec.store.manifest import Manifest
from spec.store.plan import item_key
from spec.store.reader import FeatureReader
from spec.store.segment import DamagedError, Record, Row, StoreError
from spec.store.upkeep import Removal
from tests.tiny import chain, row_digests, sequence, store_features

AGE = 1000.0
HALF = "-machine-01234567.partial"
"""Ends the name of a folder that a killed process left half-written."""


def aged(path: Path, seconds: float = 2 * AGE) -> Path:
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def age_all(root: Path) -> None:
    for path in root.glob("*/*/"):
        aged(path)


def snapshot(root: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file and folder but the lock of the whole store."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in root.rglob("*")
        if path.name != ".in-use"
    }


def folder_of(root: Path, manifest: Manifest) -> Path:
    return manifest.last.collection(root).folder


def keep(root: Path, path: Path, manifest: Manifest) -> Path:
    """Save a manifest in a workspace, and tell the store, as the cache stage does. Returns its root."""
    before = set((root / upkeep.ROOTS).glob("*"))
    manifest.save(path)
    upkeep.add_root(root, path, manifest.needed(root))
    (made,) = set((root / upkeep.ROOTS).glob("*")) - before
    return made


def commit(collection: Collection, items: Sequence[str], rows: Sequence[Row], **attributes: Any) -> Record:
    claim = collection.claim(items)
    assert claim is not None
    return claim.commit(rows, attributes, NONE)


def save_tables(root: Path, manifest: Manifest) -> Record:
    collection, row = manifest.tables(root), {"lm_head": np.ones((3, 2), np.float32)}
    collection.create()
    return commit(collection, ["tables"], [row], offsets={"lm_head": "lm_head_offsets"})


def save_answers(root: Path, prompts: Sequence[Any], tokenizer: str = "t", group: int = 3) -> Collection:
    """Answers to prompts, three in a segment."""
    collection = Collection(root, "answers", {"base": "w", "tokenizer": tokenizer})
    collection.create()
    for start in range(0, len(prompts), group):
        part = [np.asarray(prompt, np.int32) for prompt in prompts[start : start + group]]
        rows = [{"prompt": prompt, "answer": prompt[::-1] + 1} for prompt in part]
        producer = {"torch": "2", "device": "cpu" if start else "H100"}
        commit(collection, list(map(item_key, part)), rows, offsets=answers.OFFSETS, producer=producer)
    return collection


def test_a_file_is_remembered_by_path_and_content(tmp_path: Path) -> None:
    """So branches that write to one path keep a root each."""
    path, other = tmp_path / "train.json", tmp_path / "elsewhere.json"
    assert upkeep.root_segments(tmp_path, path) == {}
    for content in ("one", "two"):
        path.write_text(content)
        assert not upkeep.touch_root(tmp_path, path)
        upkeep.add_root(tmp_path, path, {"features-1": ["a", "b"]})
        upkeep.add_root(tmp_path, path, {"features-1": [content], "answers-2": ["c"]})
    other.write_text("one")
    upkeep.add_root(tmp_path, other, {"features-1": ["elsewhere"]})
    roots = list((tmp_path / upkeep.ROOTS).iterdir())
    assert len(roots) == 3
    path.write_text("one")
    assert upkeep.root_segments(tmp_path, path) == {"features-1": ["one"], "answers-2": ["c"]}
    assert upkeep.root_segments(tmp_path, other) == {"features-1": ["elsewhere"]}
    for root in roots:
        aged(root)
    assert upkeep.touch_root(tmp_path, path)
    assert sum(time.time() - root.stat().st_mtime < AGE for root in roots) == 1


def gc(root: Path, age: float = AGE) -> Removal:
    """Remove what a dry run, which removes nothing, has counted."""
    before, dry = snapshot(root), upkeep.gc(root, age, remove=False)
    assert snapshot(root) == before
    assert upkeep.gc(root, age) == dry
    return dry


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_what_a_manifest_names_stays_and_what_none_names_goes(root: Path, tmp_path: Path) -> None:
    kept = store_features(root, chain(6, 24))
    unnamed = set(store_features(root, chain(6, 24, seed=1)).last.segments)
    folder, tables = folder_of(root, kept), save_tables(root, kept)
    asked = save_answers(root, [[1, 2, 3]])
    gone = [*(folder / name for name in unnamed), *(asked.folder / name for name in asked.records())]
    held = keep(root, tmp_path / "train.json", kept)
    age_all(root)
    young = store_features(root, chain(3, 24, seed=2))
    size = sum(file.stat().st_size for path in gone for file in path.rglob("*") if file.is_file())
    stays = {*kept.last.segments, *young.last.segments}
    assert gc(root) == Removal(len(gone), rows=7, bytes=size, kept=len(stays) + 1)
    assert set(segment.names(folder)) == stays
    assert len(list(FeatureReader(kept, root).sequences(range(6)))) == 6
    assert set(kept.tables(root).records()) == {tables.name}
    gc(root, 0)
    assert set(segment.names(folder)) == set(kept.last.segments)
    held.unlink()
    gc(root, 0)
    assert {path.name for path in root.iterdir()} == {upkeep.ROOTS, ".in-use"}


def test_litter_and_damage_go_and_damage_that_is_named_stays(root: Path, tmp_path: Path) -> None:
    kept = store_features(root, chain(6, 24))
    collection = kept.last.collection(root)
    keep(root, tmp_path / "train.json", kept)
    spoilt = store_features(root, chain(3, 24, seed=1)).last.segments[0]
    aside = store_features(root, chain(3, 24, seed=2)).last.segments[0]
    (collection.folder / spoilt / segment.RECORD).write_text("{")
    aged(collection.folder / spoilt)
    collection.set_aside(aside)
    shutil.copytree(collection.folder / kept.last.segments[0], collection.folder / f".{spoilt}{HALF}")
    (collection.folder / kept.last.segments[1] / segment.RECORD).unlink()
    aged(collection.folder / kept.last.segments[1])
    removal = gc(root)
    left = {path.name for path in collection.folder.iterdir() if path.is_dir()}
    others = {name for seed in (1, 2) for name in store_features(root, chain(3, 24, seed=seed)).last.segments}
    assert left - others == set(kept.last.segments)
    assert not any(name.startswith(".") or name in (spoilt, aside) for name in left)
    assert removal.segments == 3


def test_a_root_counts_as_long_as_its_file_is_there_or_it_was_used_lately(root: Path, tmp_path: Path) -> None:
    splits = {name: store_features(root, chain(3, 24, seed=seed)) for seed, name in enumerate("abcde")}
    folder = folder_of(root, splits["a"])
    roots = {name: keep(root, tmp_path / f"{name}.json", split) for name, split in splits.items()}
    age_all(root)
    for path in roots.values():
        aged(path)
    (tmp_path / "b.json").write_text("changed")
    (tmp_path / "c.json").unlink()
    (tmp_path / "d.json").write_text("changed, but used lately")
    os.utime(roots["d"])
    (tmp_path / "e.json").unlink()
    aged(roots["e"], AGE / 2)
    removal = gc(root)
    assert set(segment.names(folder)) == {name for split in "ade" for name in splits[split].last.segments}
    assert {name for name, path in roots.items() if path.exists()} == set("ade")
    assert removal.segments == len(splits["b"].last.segments) + len(splits["c"].last.segments)


def test_nothing_is_removed_while_a_stage_uses_the_store(root: Path, tmp_path: Path) -> None:
    manifest = store_features(root, chain(3, 24))
    before = snapshot(root)
    with in_use(root):
        with pytest.raises(SpecError, match="in use by a running stage"):
            upkeep.gc(root, 0)
        with pytest.raises(SpecError, match="in use by a running stage"):
            upkeep.forget(root, "t", given_rows([chain(1, 24)[0].ids[:1]]))
    assert snapshot(root) == before
    upkeep.gc(root, 0)
    assert not folder_of(root, manifest).exists()


@pytest.mark.parametrize("content", ["", "[]", '{"path": "/nowhere"}', '{"path": 1, "file": 2, "segments": 3}'])
def test_a_damaged_root_stops_it_before_anything_goes(root: Path, content: str) -> None:
    store_features(root, chain(3, 24))
    (root / upkeep.ROOTS).mkdir()
    path = root / upkeep.ROOTS / "0123.json"
    path.write_text(content)
    before = snapshot(root)
    with pytest.raises(StoreError, match=rf"{path} is damaged"):
        upkeep.gc(root, 0)
    assert snapshot(root) == before


def test_collections_of_another_format_go_like_any_other(root: Path) -> None:
    """Nothing of them needs to be read."""
    for name, content in (("features-0123456789abcdef", '{"format": 1}'), ("answers-0123456789abcdef", "{")):
        (root / name / "0123").mkdir(parents=True)
        (root / name / "identity.json").write_text(content)
        (root / name / "tables.safetensors").write_bytes(b"tables")
        aged(root / name / "0123")
    young = root / "answers-0123456789abcdef" / "4567"
    young.mkdir()
    gc(root)
    assert [path for path in root.iterdir() if path.is_dir()] == [young.parent]
    assert [path for path in young.parent.iterdir() if path.is_dir()] == [young]


def test_what_is_not_the_stores_is_left_alone(root: Path) -> None:
    """features.store may name a folder that is used for other things too."""
    manifest = store_features(root, chain(3, 24))
    strangers = [root / "photos" / "old", root / "features" / "old", root / ".git" / "objects", root / "a-b" / "c"]
    for folder in strangers:
        folder.mkdir(parents=True)
        (folder / "file").write_text("precious")
        aged(folder)
    (root / "README").write_text("precious")
    ours = folder_of(root, manifest)
    before = {path: found for path, found in snapshot(root).items() if not path.is_relative_to(ours)}
    assert upkeep.verify(root, True) == (len(manifest.last.segments), [])
    assert [summary.folder for summary in upkeep.summaries(root)] == [ours]
    upkeep.forget(root, "t", given_rows([chain(3, 24)[0].ids]))
    upkeep.gc(root, 0)
    assert snapshot(root) == before


def test_a_store_that_is_not_there_is_empty(root: Path) -> None:
    assert list(upkeep.summaries(root)) == []
    assert upkeep.verify(root, True) == (0, [])
    assert upkeep.gc(root, 0) == upkeep.forget(root, "t", given_rows([])) == Removal()


def test_summaries_say_what_a_store_holds(root: Path) -> None:
    manifest = store_features(root, chain(12, 24))
    asked = save_answers(root, [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13]])
    collection = manifest.last.collection(root)
    spoilt, aside, *whole = manifest.last.segments
    (collection.folder / spoilt / segment.RECORD).unlink()
    collection.set_aside(aside)
    first, second = upkeep.summaries(root)
    assert (first.folder, first.segments, first.rows, first.damaged) == (asked.folder, 3, 7, ())
    assert first.producers == ("torch 2, device H100", "torch 2, device cpu")
    records = [segment.read_record(collection.folder, name) for name in whole]
    rows, size = sum(len(record.items) for record in records), sum(record.size for record in records)
    expected = (len(whole), rows, size, (spoilt, aside), ("",))
    assert second == upkeep.Summary(collection.folder, manifest.last.identity, *expected)


def damage(folder: Path, name: str, key: str = "ids") -> None:
    (path,) = (path for path in (folder / name / key / "c").rglob("*") if path.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("set_aside", [False, True])
def test_verify_names_each_damaged_segment(root: Path, set_aside: bool) -> None:
    rows = chain(12, 24)
    manifest = store_features(root, rows)
    save_tables(root, manifest)
    asked = save_answers(root, [[1, 2], [3, 4], [5, 6], [7]])
    folder = folder_of(root, manifest)
    first, second, third, *rest = manifest.last.segments
    (folder / first / segment.RECORD).unlink()
    damage(folder, second)  # which no size and no record shows
    damage(folder, third, "states")
    spoilt = asked.name_of([item_key(np.asarray([7], np.int32))])
    damage(asked.folder, spoilt, "answer")
    before = snapshot(root)
    seen: list[int] = []
    whole, problems = upkeep.verify(root, set_aside, seen.append)
    assert whole == len(rest) + 2 == len(seen)
    assert {problem.name for problem in problems if isinstance(problem, DamagedError)} == {first, second, third, spoilt}
    assert len(problems) == 4
    if not set_aside:
        assert snapshot(root) == before
        return
    assert upkeep.verify(root, True) == (whole, [])
    assert {path.name for path in folder.glob(".damaged-*")} == {f".damaged-{name}" for name in (first, second, third)}
    assert store_features(root, rows) == manifest  # only these are computed again
    seen.clear()
    assert upkeep.verify(root, True, seen.append) == (whole + 3, [])
    assert sum(seen) == stored_bytes(root)


def test_a_collection_that_cannot_be_read_is_named_and_stops_forgetting(root: Path) -> None:
    """It may hold what must be forgotten, and nothing says that its segments are damaged."""
    manifest = store_features(root, chain(3, 24))
    asked = save_answers(root, [[1, 2]])
    (asked.folder / "identity.json").write_text("{")
    before = snapshot(root)
    whole, (problem,) = upkeep.verify(root, True)
    assert whole == len(manifest.last.segments)
    assert str(asked.folder) in str(problem)
    with pytest.raises(StoreError, match=rf"{asked.folder} is no collection"):
        upkeep.forget(root, "t", given_rows([]))
    assert snapshot(root) == before
    assert [summary.folder for summary in upkeep.summaries(root)] == [folder_of(root, manifest)]


def contents(root: Path) -> bytes:
    """Everything a store holds, names of files included."""
    return b"\n".join(part for path, (_, data) in snapshot(root).items() for part in (str(path).encode(), data))


def given_rows(prompts: Sequence[Ids], texts: Sequence[Ids] = ()) -> dict[bytes, index.Start | None]:
    """What forget is given of rows that the index does not know."""
    rows = [sequence([0] * len(ids), ids) for ids in prompts] + [sequence([1] * len(ids), ids) for ids in texts]
    return {str(number).encode(): index.Start.of(row) for number, row in enumerate(rows)}


def rows_of(count: int, seed: int = 0, start: Sequence[int] = ()) -> list[TokenSequence]:
    """Random sequences, so that none lies within another; all begin with `start`."""
    generator = np.random.default_rng(seed)
    every = [[*start, *generator.integers(24, 50_000, generator.integers(8, 16))] for _ in range(count)]
    return [sequence([0] * 3 + [1] * (len(ids) - 3), ids) for ids in every]


def traces(row: TokenSequence) -> list[bytes]:
    """What tells that a row was there: ids, keys, answers."""
    keys = [item_key(row.ids, row.mask), item_key(row.ids), item_key(row.ids[: row.prompt_length])]
    return [row.ids.tobytes(), *map(str.encode, keys), (row.ids[::-1] + 1).astype(np.int32).tobytes()]


def stored_bytes(root: Path) -> int:
    return sum(summary.bytes for summary in upkeep.summaries(root))


@settings(max_examples=10)
@given(st.sets(st.integers(0, 7)), st.sampled_from([1, 40, 10**6]), st.sampled_from(["none", "none", "zstd", "fp8"]))
def test_nothing_is_left_of_forgotten_rows_and_all_of_the_others(
    tmp_path_factory: pytest.TempPathFactory, gone: set[int], limit: int, codec: str
) -> None:
    root = tmp_path_factory.mktemp("store")
    rows = rows_of(8)
    manifest = store_features(root, rows, codec=codec, segment_tokens=limit)
    collection = manifest.last.collection(root)
    save_tables(root, manifest)
    asked = save_answers(root, [row.ids for row in rows], group=limit // 10 + 1)
    foreign = save_answers(root, [row.ids for row in rows], tokenizer="u").folder
    keep(root, root.parent / "train.json", manifest)
    before, untouched = (row_digests(collection), row_digests(asked)), snapshot(foreign)
    folders, size = set(root.glob("*/*/")), stored_bytes(root)
    segments = len(manifest.last.segments) + len(asked.records())
    removal = upkeep.forget(root, "t", given_rows([rows[i].ids[:4] for i in gone]))
    assert (removal.rows, removal.bytes) == (2 * len(gone), size - stored_bytes(root))
    assert removal.segments == len(folders - set(root.glob("*/*/")))
    assert removal.kept == (segments - removal.segments if gone else 0)
    assert snapshot(foreign) == untouched
    shutil.rmtree(foreign)
    everything = contents(root)
    for number, row in enumerate(rows):
        if number in gone:
            assert not any(trace in everything for trace in traces(row))
        elif codec == "none":
            assert row.ids.tobytes() in everything  # else nothing would be shown
    lost = [{item_key(rows[i].ids, rows[i].mask) for i in gone}, {item_key(rows[i].ids) for i in gone}]
    after = row_digests(collection), row_digests(asked)
    for found, had, without in zip(after, before, lost, strict=True):
        assert found == {key: digest for key, digest in had.items() if key not in without}
    whole, problems = upkeep.verify(root, False)
    assert problems == []
    assert whole == sum(summary.segments for summary in upkeep.summaries(root))
    left = [row for number, row in enumerate(rows) if number not in gone]
    if left:  # a new manifest needs no base: nothing is computed again
        made = store_features(root, left, codec=codec, segment_tokens=limit, states=lambda row: 1 / 0)  # type: ignore[arg-type,return-value]
        assert len(list(FeatureReader(made, root).sequences(range(len(left))))) == len(left)
    if gone:
        with pytest.raises(StoreError, match="is missing or damaged"):
            FeatureReader(manifest, root).check()


def test_every_continuation_of_a_prompt_goes_and_a_text_only_as_a_whole(root: Path) -> None:
    ours, others = rows_of(4, start=[7, 8, 9]), rows_of(4, seed=1, start=[7, 8])
    collection = store_features(root, [*ours, *others]).last.collection(root)
    prompt = np.asarray([7, 8, 9], np.int32)
    removal = upkeep.forget(root, "t", given_rows([prompt]))
    assert removal.rows == 4
    assert set(row_digests(collection)) == {item_key(row.ids, row.mask) for row in others}
    assert upkeep.forget(root, "t", given_rows([prompt])).rows == 0
    longer = sequence([1] * (len(others[0]) + 1), [*others[0].ids, 5])
    other_mask = sequence([1] * len(others[0]), others[0].ids)  # the same text, supervised otherwise
    store_features(root, [longer, other_mask])
    assert upkeep.forget(root, "t", given_rows([], [others[0].ids, others[1].ids[:-1]])).rows == 2
    assert set(row_digests(collection)) == {item_key(row.ids, row.mask) for row in [*others[1:], longer]}


def test_rows_that_the_index_knows_go_whatever_made_them(root: Path) -> None:
    """Another template, date or tokenizer renders the row otherwise now, or cannot render it."""
    rows = [replace(row, source=bytes([0, number, *[0] * 14])) for number, row in enumerate(rows_of(4))]
    index.write(root, rows[:3])
    index.write(root, rows[2:])
    collection = store_features(root, rows).last.collection(root)
    removal = upkeep.forget(root, "of another tokenizer", {rows[0].source: None, rows[3].source: None, b"other": None})
    assert (removal.rows, removal.indexed, removal.missed) == (2, 2, 1)
    assert set(row_digests(collection)) == {item_key(row.ids, row.mask) for row in rows[1:3]}
    assert not any(row.source in contents(root) for row in (rows[0], rows[3]))
    assert set(index.find(root, {row.source for row in rows})) == {rows[1].source, rows[2].source}


def test_damage_stops_it_and_what_cannot_be_read_goes_since_it_may_hold_them(root: Path) -> None:
    """Damaged segments that were set aside, and what killed processes left half-written."""
    rows = rows_of(9)
    manifest = store_features(root, rows, segment_tokens=40)
    collection = manifest.last.collection(root)
    first, second = (manifest.last.segments[manifest.last.segment[index]] for index in (0, 8))
    damage(collection.folder, first)
    with pytest.raises(DamagedError, match=rf"segment {first} in {collection.folder} is missing or damaged"):
        upkeep.forget(root, "t", given_rows([rows[0].ids[:5]]))
    upkeep.verify(root, True)
    (collection.folder / second).rename(collection.folder / f".{second}{HALF}")
    assert rows[8].ids.tobytes() in contents(root)
    upkeep.forget(root, "t", given_rows([rows[0].ids[:5], rows[8].ids[:5]]))
    assert not any(trace in contents(root) for trace in [*traces(rows[0]), *traces(rows[8])])
    assert not any(path.name.startswith(".") for path in collection.folder.iterdir())


def test_forgetting_that_was_interrupted_is_completed_by_the_next(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(9)
    collection = store_features(root, rows, segment_tokens=40).last.collection(root)
    before = row_digests(collection)
    real, removed = shutil.rmtree, []

    def stop(path: Path, *more: Any, **options: Any) -> None:
        if not Path(path).name.startswith("."):
            removed.append(path)
            if len(removed) == 2:
                raise KeyboardInterrupt
        real(path, *more, **options)

    monkeypatch.setattr(shutil, "rmtree", stop)
    gone = [row.ids[:5] for row in rows[::3]]
    with pytest.raises(KeyboardInterrupt):
        upkeep.forget(root, "t", given_rows(gone))
    monkeypatch.undo()
    upkeep.forget(root, "t", given_rows(gone))
    assert not any(trace in contents(root) for row in rows[::3] for trace in traces(row))
    without = {item_key(row.ids, row.mask) for row in rows[::3]}
    assert row_digests(collection) == {key: digest for key, digest in before.items() if key not in without}
    assert upkeep.verify(root, False)[1] == []

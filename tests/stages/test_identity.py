"""What was made for another base, dtype, codec or length is refused, by name and with both values."""

import json
import re
from pathlib import Path

import pytest

from spec import files
from spec.store.manifest import Manifest
from stages import common
from tests.stages.workspace import command, ok, refused

PATHS = {"train": "features/train.json", "evaluate": "features/eval.json", "cache": "responses/train.parquet"}


def change_source(name: str, value: str) -> None:
    """As fetch would write for another base."""
    sources = common.read_sources()
    sources["base"][name] = value
    files.write_json(common.SOURCES, sources)


def test_a_manifest_is_believed(folder: Path) -> None:
    """Whatever the parameters would make of it now: dvc runs the cache stage where one of them has changed."""
    for stage in ("train", "evaluate"):
        ok(stage, "features.codec=fp8", "features.segment_tokens=1", "trainer.total_epochs=1")


@pytest.mark.parametrize("stage", PATHS)
@pytest.mark.parametrize(("part", "field"), [("weights", "base"), ("tokenizer", "tokenizer")])
def test_another_base(folder: Path, stage: str, part: str, field: str) -> None:
    digest = common.read_sources()["base"][part]
    change_source(part, "another")
    assert f"data/{PATHS[stage]}: its {field} is '{digest}', and 'another' is expected" in refused(stage)


def test_another_generation_config_changes_no_feature(folder: Path) -> None:
    change_source("generation", "another")
    ok("train", "trainer.total_epochs=1")
    assert "data/responses/train.parquet: its generation is " in refused("cache")


@pytest.mark.parametrize(("stage", "split"), [("train", "train"), ("train", "val"), ("evaluate", "eval")])
def test_a_manifest_is_of_joint_training_or_not(folder: Path, stage: str, split: str) -> None:
    if split != "val":  # train stops at the first
        message = refused(stage, "model.freeze_base_model=false", "respond.source=data")
        assert f"data/features/{split}.json: its freeze_base_model is True, and False is expected" in message
    base = common.read_sources()["base"]
    Manifest(base, "float32", hidden_size=32, vocab_size=304, layers=2).save(common.features_path(split))
    assert f"data/features/{split}.json: its freeze_base_model is False, and True is expected" in refused(stage)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("respond.max_new_tokens=13", "its max_new_tokens is 12, and 13 is expected"),
        ("respond.temperature=0.5", "its temperature is 0.0, and 0.5 is expected"),
        ("respond.source=data", "its source is 'base', and 'data' is expected"),
        ("model.dtype=bfloat16", "its dtype is 'float32', and 'bfloat16' is expected"),
    ],
)
def test_responses_of_other_parameters(folder: Path, override: str, words: str) -> None:
    before = Path("data/features/train.json").read_bytes()
    assert f"data/responses/train.parquet: {words}" in refused("cache", override)
    assert Path("data/features/train.json").read_bytes() == before


def test_a_store_that_lacks_the_features_and_heads_of_another_base_are_named(folder: Path) -> None:
    ok("train", "trainer.total_epochs=1")
    for stage in ("train", "evaluate"):
        said = refused(stage, "features.store=empty")
        assert re.search(r"segment .* in empty/.* is missing .*`spec cache` compute", said)
    path = Path("models/speculator/config.json")
    values = json.loads(path.read_text())
    for name, value, words in (
        ("hidden_size", 31, "hidden_size: the speculator was trained on"),
        ("vocab_size", 305, "with 305, this base has 304"),
        ("base_digest", "another", "with weights another, this base's are"),
    ):
        path.write_text(json.dumps(values | {name: value}))
        assert words in refused("evaluate")


def test_what_is_computed_again_in_another_arithmetic_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a GPU are not mixed with those of a CPU that computes in float32; the manifest stays what it is."""
    store = "features.store=own"
    for arithmetic in ("bfloat16", "float32"):
        monkeypatch.setattr(common, "arithmetic_here", lambda config, found=arithmetic: found)
        said = ok("respond", store) + ok("cache", store)
    for stage in ("respond", "cache"):
        assert re.search(rf"{stage}: the store has \d+ of them computed in bfloat16; here .* again, in float32", said)
    assert len(list(Path("own").glob("states-*"))) == len(list(Path("own").glob("answers-*"))) == 2
    assert len(list(Path("own").glob("tables-*"))) == 1
    monkeypatch.setattr(common, "arithmetic_here", lambda config: "bfloat16")
    assert "cache: 0 of" in ok("cache", store)  # answers are read whatever they were computed in
    ok("train", store, "trainer.total_epochs=1")


def test_a_worker_that_computes_otherwise_stops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_json(Path("plan.json"), {"arithmetic": "bfloat16", "groups": []})
    for stage in ("respond", "cache"):
        said = command(stage, "--worker", "plan.json", status=1)
        assert "this worker computes in float32, and the stage that started it in bfloat16" in said

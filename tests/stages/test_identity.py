"""What was made for another base, dtype, codec or length is refused, by name and with both values."""

import dataclasses
import json
from pathlib import Path

import pytest

from spec import files
from spec.store.manifest import Manifest
from stages import common
from tests.stages.workspace import ok, refused


def change_source(name: str, value: str) -> None:
    """As fetch would write for another base."""
    sources = common.read_sources()
    sources["base"][name] = value
    files.write_json(common.SOURCES, sources)


STAGES = [("train", "train"), ("train", "val"), ("evaluate", "eval")]


@pytest.mark.parametrize(("stage", "split"), STAGES[::2])
@pytest.mark.parametrize(
    ("override", "field", "found", "expected"),
    [
        ("model.dtype=bfloat16", "dtype", "float32", "bfloat16"),
        ("features.codec=fp8", "encoding", "exact", "fp8"),
    ],
)
def test_features_of_other_parameters(
    folder: Path, stage: str, split: str, override: str, field: str, found: str, expected: str
) -> None:
    message = refused(stage, override)
    assert f"data/features/{split}.json: its {field} is '{found}', and '{expected}" in message
    assert "Run the stages that make it again" in message


@pytest.mark.parametrize(
    ("stage", "path"),
    [
        ("train", "data/features/train.json"),
        ("evaluate", "data/features/eval.json"),
        ("cache", "data/responses/train.parquet"),
    ],
)
@pytest.mark.parametrize(("part", "field"), [("weights", "base"), ("tokenizer", "tokenizer")])
def test_another_base(folder: Path, stage: str, path: str, part: str, field: str) -> None:
    digest = common.read_sources()["base"][part]
    change_source(part, "another")
    assert f"{path}: its {field} is '{digest}', and 'another' is expected" in refused(stage)


def test_another_generation_config_changes_no_feature(folder: Path) -> None:
    change_source("generation", "another")
    ok("train", "trainer.total_epochs=1")
    assert "data/responses/train.parquet: its generation is " in refused("cache")


@pytest.mark.parametrize(("stage", "split"), STAGES)
def test_features_made_in_another_way(folder: Path, stage: str, split: str) -> None:
    """As another version of the cache stage would have written, in each part of the identity or with one more."""
    path = common.features_path(split)
    manifest = Manifest.load(path)
    for field in (*manifest.identity, "quantised"):
        dataclasses.replace(manifest, identity={**manifest.identity, field: "another"}).save(path)
        expected = manifest.identity.get(field)
        assert f"{path}: its {field} is 'another', and {expected!r} is expected" in refused(stage)
    assert not Path("models").exists()


@pytest.mark.parametrize(("stage", "split"), STAGES)
def test_the_manifest_of_joint_training_holds_no_features(folder: Path, stage: str, split: str) -> None:
    base = common.read_sources()["base"]
    Manifest.joint(base, "float32", 32, 304, "").save(common.features_path(split))
    assert f"data/features/{split}.json: its layer is None, and 'last' is expected" in refused(stage)


def test_features_are_not_what_joint_training_is_made_from(folder: Path) -> None:
    joint = ("model.freeze_base_model=false", "respond.source=data")
    assert "data/features/train.json: its mode is None, and 'joint' is expected" in refused("train", *joint)
    assert "data/features/eval.json: its mode is None, and 'joint' is expected" in refused("evaluate", *joint)


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


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_store_that_lacks_the_features_is_named(folder: Path, stage: str) -> None:
    if stage == "evaluate":
        ok("train", "trainer.total_epochs=1")
    message = refused(stage, "features.store=empty")
    assert "empty" in message
    assert "cache stage" in message


def test_heads_of_another_base_are_not_evaluated(folder: Path) -> None:
    ok("train", "trainer.total_epochs=1")
    path = Path("models/speculator/config.json")
    values = json.loads(path.read_text())
    for name, value, words in (
        ("hidden_size", 31, "hidden_size: the speculator was trained on"),
        ("vocab_size", 305, "with 305, this base has 304"),
        ("base_digest", "another", "with weights another, this base's are"),
    ):
        path.write_text(json.dumps(values | {name: value}))
        assert words in refused("evaluate")

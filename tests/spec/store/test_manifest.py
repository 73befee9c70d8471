"""A split as a file: it reads back, and whatever is not one is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from spec.store.manifest import Manifest
from spec.store.segment import StoreError
from tests.tiny import chain, store_features


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return store_features(tmp_path / "store", chain(6, 24))


def test_round_trip(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "data" / "train.json"
    manifest.save(path)
    loaded = Manifest.load(path)
    assert loaded == manifest
    assert loaded.digest == manifest.digest
    assert len(loaded) == 6
    lines = path.read_text().splitlines()
    assert len(lines) == len(dataclasses.fields(Manifest)) + 2  # one field a line: a diff can be read


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("digests", ["0"] * 9),
        ("row", [1] * 6),
        ("written", [False] * 6),
        ("domains", ["x", "y", "z"]),
        ("identity", {"base": "v"}),
        ("tokens", 0),
    ],
)
def test_the_digest_follows_every_field(manifest: Manifest, field: str, value: Any) -> None:
    assert dataclasses.replace(manifest, **{field: value}).digest != manifest.digest


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"identity": {}}', '"text"', '{"unknown": 1}'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "train.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(StoreError, match=r"train\.json is not a manifest.*run the cache stage"):
        Manifest.load(path)


def test_a_manifest_of_another_layout_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    manifest.save(path)
    path.write_text(path.read_text().replace('"tokens"', '"token_count"'))
    with pytest.raises(StoreError, match="token_count"):
        Manifest.load(path)

"""A split as a file: it reads back, its digest is what it consists of, and whatever is no manifest is refused."""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec.corpus import TokenSequence
from spec.store.manifest import Manifest
from spec.store.segment import OutdatedError
from tests.tiny import TAPS, chain, sequence, states_of, store_features

ROWS = chain(6, 24)
PLACES = ({"base": {"name": "other"}}, {"segments": ["x"]}, {"digests": ["0"] * 9}, {"segment": [1] * 6}, {"row": [1]})
CONTENT = (
    *({"identity": {"layer": "last", "positions": "all"}}, {"width": 9}, {"hidden_size": 9}, {"layers": 9}),
    *({"dtype": "float16"}, {"vocab_size": 9}, {"content": "0" * 64}, {"prompt_length": [0] * 6}, {"tokens": 0}),
    *({"written": [False] * 6}, {"domain": [0] * 6}, {"domains": ["x", "y", "z"]}, {"positions": 0}),
)


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
    assert loaded.dtype == "float32"
    assert loaded.last.collection(tmp_path / "store").records().keys() == set(loaded.last.segments)
    lines = path.read_text().splitlines()
    assert len(lines) == len(dataclasses.fields(Manifest)) + 3  # one field a line: a diff can be read


def digest(root: Path, rows: Sequence[TokenSequence] = ROWS, **options: Any) -> str:
    return store_features(root, rows, **options).digest


@settings(max_examples=15)
@given(st.integers(1, 200), st.integers(0, 6), st.integers(0, 9), st.sampled_from(["none", "zstd"]))
def test_the_digest_does_not_depend_on_groups_and_codec(
    tmp_path_factory: pytest.TempPathFactory, limit: int, before: int, seed: int, codec: str
) -> None:
    """Whatever was in the store before, in whatever order it came there."""
    expected = digest(tmp_path_factory.mktemp("one"), segment_tokens=10**6)
    root = tmp_path_factory.mktemp("other")
    store_features(root, random.Random(seed).sample([*ROWS[:before], *chain(3, 24, seed=7)], before + 3))
    assert digest(root, segment_tokens=limit, codec=codec) == expected


def test_the_digest_follows_content_and_order(tmp_path: Path) -> None:
    changed = sequence(ROWS[0].mask.tolist(), [1, *ROWS[0].ids[1:]], ROWS[0].domain)
    found = [
        digest(tmp_path / "rows"),
        digest(tmp_path / "rows", ROWS[::-1]),
        digest(tmp_path / "rows", ROWS[:-1]),
        digest(tmp_path / "rows", [*ROWS, ROWS[0]]),
        digest(tmp_path / "rows", [changed, *ROWS[1:]]),
        digest(tmp_path / "states", states=lambda row: states_of(row) * (1 + (row is ROWS[3]))),
        digest(tmp_path / "fp8", codec="fp8"),
    ]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("change", [*PLACES, *CONTENT])
def test_the_digest_follows_every_field_but_places(manifest: Manifest, change: dict[str, Any]) -> None:
    if hasattr(manifest, *change):
        changed = dataclasses.replace(manifest, **change)
    else:
        changed = dataclasses.replace(manifest, taps=[dataclasses.replace(manifest.last, **change)])
    assert changed != manifest
    assert (changed.digest == manifest.digest) == (change in PLACES)


def test_it_lists_every_tap(tmp_path: Path) -> None:
    manifest = store_features(tmp_path, ROWS, taps=TAPS)
    assert [places.tap for places in manifest.taps] == list(TAPS)
    alone = store_features(tmp_path, ROWS)
    assert manifest.last == alone.last
    assert manifest.digest != alone.digest
    folders = {places.collection(tmp_path).folder.name: list(places.segments) for places in manifest.taps}
    assert len(folders) == 3
    assert folders.items() < manifest.needed(tmp_path).items()


@pytest.mark.parametrize(
    "content", [None, "", "[]", '"text"', '{"format": 3}', '{"format": 3, "taps": [1]}', '{"segments": []}']
)
def test_what_is_no_manifest_or_of_an_earlier_format_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "train.json"
    if content is not None:
        path.write_text(content)
    reason = r"\(its format is 2, this version reads 3\)" if content == '{"segments": []}' else r"\(.*\)"
    with pytest.raises(OutdatedError, match=rf"train\.json is not a manifest of features {reason}"):
        Manifest.load(path)

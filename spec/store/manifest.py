"""A split as a list of places in the store."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spec import files
from spec.store.collection import Collection
from spec.store.segment import StoreError


@dataclass(frozen=True)
class Manifest:
    """A split: where each of its sequences lies in the store, in the order of the data.

    Attributes:
        identity: of the collection that holds the segments.
        base: name, revision and digests of the base, as sources.json gives them.
        hidden_size: width d of a state.
        vocab_size: rows V of the base's lm_head.
        segments: names of the segments used.
        digests: the content digest of each of them.
        segment: for each sequence, an index into segments.
        row: for each sequence, its row in that segment.
        content: SHA-256 over the digests of all sequences, in order.
        prompt_length: tokens before the last answer.
        written: whether the base wrote that answer greedily.
        domain: an index into domains.
        domains: names.
        tokens: of all sequences.
        positions: stored states of all sequences.
    """

    identity: Mapping[str, Any]
    base: Mapping[str, Any]
    hidden_size: int
    vocab_size: int
    segments: Sequence[str]
    digests: Sequence[str]
    segment: Sequence[int]
    row: Sequence[int]
    content: str
    prompt_length: Sequence[int]
    written: Sequence[bool]
    domain: Sequence[int]
    domains: Sequence[str]
    tokens: int
    positions: int

    def __len__(self) -> int:
        return len(self.segment)

    @property
    def dtype(self) -> str:
        """Of the states."""
        dtype: str = self.identity["dtype"]
        return dtype

    @property
    def digest(self) -> str:
        """SHA-256 of what the split consists of: the feature digest that metrics refer to.

        It does not depend on the base's name or on how sequences are grouped into segments.
        """
        placed = ("base", "segments", "digests", "segment", "row")
        return files.digest_json({name: value for name, value in asdict(self).items() if name not in placed})

    def save(self, path: Path) -> None:
        """Write the manifest, one field a line."""
        fields = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in asdict(self).items())
        with files.whole(path) as temporary:
            temporary.write_text("{\n" + ",\n".join(fields) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            StoreError: a file that is missing or no manifest.
        """
        try:
            return cls(**files.read_json(path))
        except (OSError, TypeError, ValueError) as error:
            raise StoreError(f"{path} is not a manifest of features ({error}); run the cache stage") from None

    @classmethod
    def joint(cls, base: Mapping[str, Any], dtype: str, hidden_size: int, vocab_size: int, content: str) -> Manifest:
        """The manifest of a split whose states are not cached, because the base is trained too.

        `content` is the SHA-256 of the file that holds the sequences.
        """
        identity = {"mode": "joint", "base": base["weights"], "tokenizer": base["tokenizer"], "dtype": dtype}
        return cls(identity, base, hidden_size, vocab_size, [], [], [], [], content, [], [], [], [], 0, 0)

    def collection(self, root: Path) -> Collection:
        """The collection of a store that holds the segments."""
        return Collection(root, "features", self.identity)


def make_manifest(
    collection: Collection,
    keys: Sequence[str],
    *,
    base: Mapping[str, Any],
    hidden_size: int,
    vocab_size: int,
    prompt_length: Sequence[int],
    written: Sequence[bool],
    domains: Sequence[str],
    tokens: int,
    positions: int,
) -> Manifest:
    """The manifest of sequences that are all in a collection.

    Args:
        collection: holds them.
        keys: content key of each, in the order of the data.
        domains: name of each sequence's domain; the rest is as in Manifest.
    """
    places, records = collection.find(), collection.records()
    used = list(dict.fromkeys(places[key][0] for key in keys))
    number = {name: index for index, name in enumerate(used)}
    names = sorted(set(domains))
    return Manifest(
        identity=collection.identity,
        base=base,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        segments=used,
        digests=[records[name].digest for name in used],
        segment=[number[places[key][0]] for key in keys],
        row=[places[key][1] for key in keys],
        content=files.digest_json([records[name].digests[row] for name, row in map(places.__getitem__, keys)]),
        prompt_length=prompt_length,
        written=written,
        domain=[names.index(domain) for domain in domains],
        domains=names,
        tokens=tokens,
        positions=positions,
    )

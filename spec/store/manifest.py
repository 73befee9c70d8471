"""A split as a list of places in the store."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spec import files
from spec.store.segment import StoreError


@dataclass(frozen=True)
class Manifest:
    """A split: where each of its sequences lies in the store, in the order of the data.

    Attributes:
        identity: of the collection that holds the segments.
        base: name, revision, weights and tokenizer of the base, as sources.json gives them.
        dtype: of the states.
        hidden_size: width d of a state.
        vocab_size: rows V of the base's lm_head.
        segments: names of the segments used.
        digests: the content digest of each of them.
        segment: for each sequence, an index into segments.
        row: for each sequence, its row in that segment.
        prompt_length: tokens before the last answer.
        written: whether the base wrote that answer greedily.
        domain: an index into domains.
        domains: names.
        tokens: of all sequences.
        positions: stored states of all sequences.
    """

    identity: Mapping[str, Any]
    base: Mapping[str, Any]
    dtype: str
    hidden_size: int
    vocab_size: int
    segments: Sequence[str]
    digests: Sequence[str]
    segment: Sequence[int]
    row: Sequence[int]
    prompt_length: Sequence[int]
    written: Sequence[bool]
    domain: Sequence[int]
    domains: Sequence[str]
    tokens: int
    positions: int

    def __len__(self) -> int:
        return len(self.segment)

    @property
    def digest(self) -> str:
        """SHA-256 of everything the split consists of: the feature digest that metrics refer to."""
        return files.digest_json(asdict(self))

    def save(self, path: Path) -> None:
        """Write the manifest, one field a line."""
        fields = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in asdict(self).items())
        with files.replacing(path) as temporary:
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

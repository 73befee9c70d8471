"""A split as a list of places in the store."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from spec import files
from spec.corpus import TokenSequence
from spec.heads import LAST, Tap
from spec.store import identity, tables
from spec.store.collection import Collection
from spec.store.segment import FORMAT, OutdatedError


@dataclass(frozen=True)
class Places:
    """Where the vectors of one tap lie, for each sequence of a split."""

    identity: Mapping[str, Any]  # of the collection that holds them
    width: int  # of a vector
    segments: Sequence[str]  # names of the segments used
    digests: Sequence[str]  # the content digest of each of them
    segment: Sequence[int]  # for each sequence, an index into segments
    row: Sequence[int]  # for each sequence, its row in that segment

    @property
    def tap(self) -> Tap:
        """Which vectors they are."""
        return identity.tap_of(self.identity)

    def collection(self, root: Path) -> Collection:
        """The collection of a store that holds the segments."""
        return Collection(root, "states", self.identity)


@dataclass(frozen=True)
class Manifest:
    """A split: where each of its sequences lies in the store, in the order of the data.

    Where the base is trained too, no states are kept, and nothing is said of the sequences but their `content`.

    Attributes:
        base: name, revision and digests of the base, as sources.json gives them.
        dtype: of the states and the base's tables.
        hidden_size: width d of the vectors that lm_head reads.
        vocab_size: rows V of the base's lm_head.
        layers: of the base.
        content: SHA-256 over the digests of all sequences, in order; of the file of sequences where none are kept.
        layer: the shape of the base's layers, as spec.heads.Layer has it.
        taps: where the vectors of each tap lie, LAST first.
        prompt_length: tokens before the last answer.
        written: whether the base wrote that answer greedily.
        domain: an index into domains, which are names.
        tokens: of all sequences.
        positions: "answers" positions of all sequences.
    """

    base: Mapping[str, Any]
    dtype: str
    hidden_size: int
    vocab_size: int
    layers: int
    layer: Mapping[str, Any] | None = None
    taps: Sequence[Places] = ()
    content: str = ""
    prompt_length: Sequence[int] = ()
    written: Sequence[bool] = ()
    domain: Sequence[int] = ()
    domains: Sequence[str] = ()
    tokens: int = 0
    positions: int = 0

    def __len__(self) -> int:
        return len(self.prompt_length)

    @property
    def frozen(self) -> bool:
        """Whether the base is frozen, so that states are kept."""
        return bool(self.taps)

    @property
    def last(self) -> Places:
        """Where the base's last states lie."""
        return self.taps[0]

    @property
    def digest(self) -> str:
        """SHA-256 of what the split consists of: the feature digest that metrics refer to.

        It does not depend on the base's name or on how sequences are grouped into segments.
        """
        entry = asdict(self)
        del entry["base"]
        entry["taps"] = [{"identity": tap["identity"], "width": tap["width"]} for tap in entry["taps"]]
        return files.digest_json(entry)

    def reading(self, taps: Sequence[Tap]) -> Manifest:
        """The same with the vectors of LAST and of these taps alone; an OutdatedError where it lacks some of them."""
        kept = {places.tap: places for places in self.taps}
        lacking = [f"layer {tap.layer} ({tap.positions})" for tap in taps if tap not in kept]
        if lacking:
            raise OutdatedError(f"the features lack what the heads read, {', '.join(lacking)}")
        return replace(self, taps=[kept[tap] for tap in dict.fromkeys((LAST, *taps))])

    def save(self, path: Path) -> None:
        """Write the manifest, one field a line."""
        fields = {"format": FORMAT, **asdict(self)}
        lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
        with files.whole(path) as temporary:
            temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest; an OutdatedError where the file is missing, of another format, or no manifest."""
        try:
            entry = files.read_json(path)
            version = entry.pop("format", 2)
            if version != FORMAT:
                raise ValueError(f"its format is {version}, this version reads {FORMAT}")
            return cls(**{**entry, "taps": [Places(**places) for places in entry["taps"]]})
        except (OSError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise OutdatedError(f"{path} is not a manifest of features ({error})") from None

    def tables(self, root: Path) -> Collection:
        """The collection of a store that holds the base's tables."""
        return tables.collection(root, self.base, self.dtype)

    def needed(self, root: Path) -> dict[str, list[str]]:
        """The segments of a store that the split needs, by their collection's folder."""
        found = {places.collection(root).folder.name: list(places.segments) for places in self.taps}
        kept = self.tables(root)
        return {**found, kept.folder.name: [kept.name_of([tables.ITEM])]} if self.taps else {}


def make_manifest(
    collections: Sequence[Collection], keys: Sequence[str], rows: Sequence[TokenSequence], *, greedy: bool, **base: Any
) -> Manifest:
    """The manifest of sequences (with their keys) of which every collection holds the vectors, LAST first.

    `greedy` says whether the base wrote the last answers greedily; `base` are the fields of Manifest down to `layer`.
    """
    domains = sorted({row.domain for row in rows})
    found = [_places(collection, keys) for collection in collections]
    assert found[0][0].tap == LAST
    return Manifest(
        **base,
        taps=[places for places, _ in found],
        content=files.digest_json([digests for _, digests in found]),
        prompt_length=[row.prompt_length for row in rows],
        written=[greedy and row.prompt_length > 0 for row in rows],
        domain=[domains.index(row.domain) for row in rows],
        domains=domains,
        tokens=sum(map(len, rows)),
        positions=sum(int(row.mask[1:].sum()) for row in rows),
    )


def _places(collection: Collection, keys: Sequence[str]) -> tuple[Places, list[str]]:
    """Where the vectors of some sequences lie, and the digest of each."""
    found, records = collection.find(), collection.records()
    used = list(dict.fromkeys(found[key][0] for key in keys))
    number = {name: index for index, name in enumerate(used)}
    places = Places(
        identity=collection.identity,
        width=collection.read(used[0], only=())[1]["width"],
        segments=used,
        digests=[records[name].digest for name in used],
        segment=[number[found[key][0]] for key in keys],
        row=[found[key][1] for key in keys],
    )
    return places, [records[name].digests[row] for name, row in map(found.__getitem__, keys)]

"""cache: the frozen base runs once over every sequence; its hidden states go to the store."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spec import base, corpus, files
from spec.config import Config
from spec.corpus import TokenSequence
from spec.store import features, index, locks, upkeep
from spec.store.collection import Collection
from spec.store.features import FeatureRow
from spec.store.manifest import Manifest
from spec.store.plan import item_key
from spec.workers import this_worker
from stages import common


@dataclass(frozen=True)
class _Sequences:
    """Every sequence of every split, and where its states are kept."""

    collection: Collection
    splits: dict[str, list[TokenSequence]]
    keys: dict[str, list[str]]

    def rows(self) -> list[FeatureRow]:
        return [
            FeatureRow(key, row.ids, row.mask)
            for split, rows in self.splits.items()
            for key, row in zip(self.keys[split], rows, strict=True)
        ]


@common.worker_option
@common.stage
def cache(config: Config, worker: Path | None) -> None:
    """Run the base over what the store lacks, and write data/features/SPLIT.json."""
    sources = common.read_sources()
    if not config.model.freeze_base_model:
        _write_joint(config, sources)
        return
    splits = {split: _read(config, split, sources) for split in common.SPLITS}
    identity = features.identity(sources["base"], config.model.dtype, features.codec_of(config.features))
    collection = Collection(common.store_root(config), "features", identity)
    keys = {split: [item_key(row.ids, row.mask) for row in rows] for split, rows in splits.items()}
    sequences = _Sequences(collection, splits, keys)
    if worker is not None:
        _work(config, sequences, files.read_json(worker), sources)
        return
    rows = sequences.rows()
    with locks.in_use(collection.root):
        index.write(collection.root, itertools.chain.from_iterable(splits.values()))
        groups = common.plan_missing(
            collection, "cache", lambda known: features.plan(rows, known, config.features.segment_tokens)
        )
        missing = [rows[number] for group in groups for number in group]
        tokens = sum(len(row.ids) for row in missing)
        unique = len({row.key for row in rows})
        common.say(f"cache: {len(missing)} of {unique} sequences ({tokens:,} tokens) are not in the store yet")
        if groups or not features.has_tables(collection):
            positions = sum(int(row.mask[1:].sum()) for row in missing)
            width = text_config(config, sources).hidden_size
            needed = features.stored_bytes(
                positions, tokens, width, config.model.dtype, features.codec_of(config.features)
            )
            common.need_space(collection.folder, needed, "cache")
            common.run_workers(config, "stages.cache", groups)
        report = {split: _write(config, split, sequences, sources["base"]) for split in splits}
    _report(report)


def _report(report: dict[str, dict[str, float]]) -> None:
    """What the splits come to, in full and as dvc shows it."""
    files.write_json(common.CACHE_RESULTS / common.DETAILS, report)
    shown = {"bytes_pos": round(report["train"]["bytes_per_position"])} if report else {}
    files.write_json(common.CACHE_RESULTS / "metrics.json", shown)


def _write_joint(config: Config, sources: dict[str, Any]) -> None:
    """Empty manifests: when the base is trained too, its states are never the same twice."""
    text = text_config(config, sources)
    for split in common.SPLITS:
        _read(config, split, sources)
        target = common.features_path(split)
        Manifest.joint(
            sources["base"],
            config.model.dtype,
            text.hidden_size,
            text.vocab_size,
            files.digest_file(common.responses_path(split)),
        ).save(target)
        common.say(f"cache {split}: nothing to cache, the base is trained too -> {target}")
    _report({})


def text_config(config: Config, sources: dict[str, Any]) -> Any:
    """The configuration of the base's language model: hidden_size, vocab_size."""
    return base.read_config(common.base_folder(config, sources), config.model.trust_remote_code).get_text_config()


def _read(config: Config, split: str, sources: dict[str, Any]) -> list[TokenSequence]:
    path = common.responses_path(split)
    common.check_origin(path, common.responses_origin(config, sources))
    return corpus.read(path)


def _work(config: Config, sequences: _Sequences, groups: list[list[int]], sources: dict[str, Any]) -> None:
    """This worker's part."""
    me = this_worker()
    folder = common.base_folder(config, sources)
    model = base.load(config.model, folder, sources["base"]["weights"])
    rows = sequences.rows()
    if me.first:
        features.save_tables(model, sequences.collection, rows)
    total = sum(len(rows[number].ids) for group in groups for number in group)
    with common.shared_progress(total, "tokens", "cache", me) as advance:
        codec = features.codec_of(config.features)
        features.produce(model, sequences.collection, rows, groups, codec, advance, me.rank, me.world)


def _write(config: Config, split: str, sequences: _Sequences, base: dict[str, Any]) -> dict[str, float]:
    """The split's manifest; returns what it comes to."""
    collection, rows = sequences.collection, sequences.splits[split]
    greedy = config.base_answers and config.respond.temperature == 0
    manifest = features.describe(collection, rows, sequences.keys[split], base, greedy)
    target = common.features_path(split)
    manifest.save(target)
    answered = upkeep.root_segments(collection.root, common.responses_path(split))
    upkeep.add_root(collection.root, target, {**answered, collection.folder.name: manifest.segments})
    # A segment may hold rows of other splits: what one of its positions takes is what this split pays for each of its.
    used = [collection.record(name) for name in manifest.segments]
    stored = sum(record.size for record in used)
    held = sum(features.positions_of(collection, record.name) for record in used)
    a_position = stored / held if held else 0.0
    share = manifest.positions / manifest.tokens
    common.say(
        f"cache {split}: {len(rows)} sequences, {manifest.positions:,} positions ({share:.0%} of {manifest.tokens:,} "
        f"tokens), {a_position:,.0f} bytes each ({common.size(a_position * manifest.positions)}) -> {target}"
    )
    return {
        "sequences": len(rows),
        "tokens": manifest.tokens,
        "positions": manifest.positions,
        "share_kept": round(share, 4),
        "bytes_per_position": round(a_position, 1),
    }


if __name__ == "__main__":
    cache()

"""cache: the frozen base runs once over every sequence; what heads read of it goes to the store."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from spec import base, files
from spec.config import Config
from spec.heads import LAST
from spec.store import features, index, locks, tables, upkeep
from spec.store.features import FeatureRow, Group, TapStore
from spec.store.manifest import Manifest, Places, make_manifest
from spec.workers import Worker, this_worker
from stages import common


@common.worker_option
@common.stage
def cache(config: Config, worker: Path | None) -> None:
    """Run the base over what the store lacks, and write data/features/SPLIT.json."""
    sources = common.read_sources()
    splits = {split: common.read_responses(config, split, sources) for split in common.SPLITS}
    folder = common.base_folder(config, sources)
    text = base.read_config(folder, config.model.trust_remote_code).get_text_config()
    if not config.model.freeze_base_model:
        _write_joint(config, sources, text)
        return
    rows = {split: list(map(FeatureRow.of, each)) for split, each in splits.items()}
    every = list(itertools.chain.from_iterable(rows.values()))
    computed_in, root = common.arithmetic_here(config), common.store_root(config)
    stores = features.tap_stores(root, sources["base"], config, computed_in, text.num_hidden_layers)
    kept = tables.collection(root, sources["base"], config.model.dtype)
    if worker is not None:
        groups = common.read_plan(worker, config)["groups"]
        me = this_worker()
        model = base.load(config.model, folder, sources["base"]["weights"])
        if me.first:
            tables.save(model, kept, [row.ids for row in every])
        _produce(model, stores, every, groups, me)
        return
    with locks.in_use(root):
        index.write(root, itertools.chain.from_iterable(splits.values()))
        known = [common.known_rows(store.collection, "cache") for store in stores]
        with_tables = tables.ITEM in common.known_rows(kept, "cache")
        groups = features.plan(every, known, config.features.segment_tokens)
        _say_missing(stores, every, groups)
        if groups or not with_tables:
            common.need_space(root, _needed_bytes(config, stores, every, groups, text.hidden_size), "cache")
            common.run_workers(config, "stages.cache", {"arithmetic": computed_in, "groups": groups})
        greedy = config.base_answers and config.respond.temperature == 0
        collections, shape = [store.collection for store in stores], tables.shape(kept)
        report = {}
        for split, each in splits.items():
            keys = [row.key for row in rows[split]]
            manifest = make_manifest(collections, keys, each, greedy=greedy, base=sources["base"], **shape)
            report[split] = _write(root, split, manifest)
    _report(report)


def _produce(model: base.Base, stores: list[TapStore], rows: list[FeatureRow], groups: list[Group], me: Worker) -> None:
    """This worker's part."""
    total = sum(len(rows[number].ids) for numbers, _ in groups for number in numbers)
    with common.shared_progress(total, "tokens", "cache", me) as advance:
        features.produce(model, stores, rows, groups, advance, me.rank, me.world)


def _say_missing(stores: list[TapStore], rows: list[FeatureRow], groups: list[Group]) -> None:
    """How many sequences are to be computed, and for each tap how many the store has in another arithmetic."""
    missing = [rows[number] for numbers, _ in groups for number in numbers]
    tokens, unique = sum(len(row.ids) for row in missing), len({row.key for row in rows})
    taps = [stores[number].tap for number in sorted({number for _, taps in groups for number in taps})]
    lacking = ", ".join("last states" if tap == LAST else f"layer {tap.layer}" for tap in taps)
    which = f"; to compute: {lacking}" if lacking else ""
    common.say(f"cache: {len(missing)} of {unique} sequences ({tokens:,} tokens) are not in the store yet{which}")
    for number, store in enumerate(stores):
        keys = {rows[index].key for numbers, taps in groups if number in taps for index in numbers}
        if keys:
            common.say_computed_elsewhere(store.collection, keys, "cache")


def _needed_bytes(
    config: Config, stores: list[TapStore], rows: list[FeatureRow], groups: list[Group], width: int
) -> int:
    """What the segments of some groups take at most."""
    needed = 0
    for numbers, taps in groups:
        group = [rows[number] for number in numbers]
        vectors = sum(stores[tap].position_bytes(group, width, config.model.dtype) for tap in taps)
        needed += vectors + len(taps) * 5 * sum(len(row.ids) for row in group)
    return needed


def _report(report: dict[str, dict[str, float]]) -> None:
    """What the splits come to, in full and as dvc shows it."""
    files.write_json(common.CACHE_RESULTS / common.DETAILS, report)
    shown = {"bytes_pos": round(report["train"]["bytes_per_position"])} if report else {}
    files.write_json(common.CACHE_RESULTS / "metrics.json", shown)


def _write_joint(config: Config, sources: dict[str, Any], text: Any) -> None:
    """Empty manifests: when the base is trained too, its states are never the same twice."""
    shape = (text.hidden_size, text.vocab_size, text.num_hidden_layers)
    for split in common.SPLITS:
        target, content = common.features_path(split), files.digest_file(common.responses_path(split))
        Manifest(sources["base"], config.model.dtype, *shape, content=content).save(target)
        common.say(f"cache {split}: nothing to cache, the base is trained too -> {target}")
    _report({})


def _write(root: Path, split: str, manifest: Manifest) -> dict[str, float]:
    """Keep the split's manifest; returns what it comes to."""
    target = common.features_path(split)
    manifest.save(target)
    answered = upkeep.root_segments(root, common.responses_path(split))
    upkeep.add_root(root, target, {**answered, **manifest.needed(root)})
    stored = sum(_bytes_of(places, root, manifest) for places in manifest.taps)
    a_position = stored / manifest.positions if manifest.positions else 0.0
    share = manifest.positions / manifest.tokens
    common.say(
        f"cache {split}: {len(manifest)} sequences, {manifest.positions:,} positions ({share:.0%} of "
        f"{manifest.tokens:,} tokens), {a_position:,.0f} bytes each ({common.size(stored)}) -> {target}"
    )
    return {
        "sequences": len(manifest),
        "tokens": manifest.tokens,
        "positions": manifest.positions,
        "share_kept": round(share, 4),
        "bytes_per_position": round(a_position, 1),
    }


def _bytes_of(places: Places, root: Path, manifest: Manifest) -> float:
    """What a split takes of its segments of a tap, which may hold rows of other splits: its part of their vectors."""
    collection = places.collection(root)
    size = sum(collection.record(name).size for name in places.segments)
    ends = (collection.read(name, ("state_offsets",))[0]["state_offsets"][-1] for name in places.segments)
    mine = manifest.positions if places.tap.positions == "answers" else manifest.tokens
    return size * mine / max(int(sum(ends)), 1)


if __name__ == "__main__":
    cache()

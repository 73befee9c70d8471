"""cache: the frozen base runs once over every sequence; its hidden states go to the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from spec import base, corpus, files
from spec.config import Config
from spec.corpus import TokenSequence
from spec.store import features
from spec.store.collection import Collection, item_key, plan
from spec.store.manifest import Manifest
from spec.workers import this_worker
from stages import common


@common.worker_option
@common.stage
def cache(config: Config, worker: Path | None) -> None:
    """Run the base over what the store lacks, and write data/features/SPLIT.json."""
    sources = common.read_sources()
    responses = {split: corpus.read(common.responses_path(split)) for split in common.SPLITS}
    sequences = [row for rows in responses.values() for row in rows]
    keys = [item_key(row.ids, row.mask) for row in sequences]
    identity = features.identity(sources["base"], config.model.dtype)
    collection = Collection(common.store_root(config), "features", identity)
    if worker is not None:
        _work(config, collection, keys, sequences, files.read_json(worker), sources)
        return
    collection.create()
    lengths = [len(row) for row in sequences]
    groups = plan(keys, lengths, collection.find(), base.bucket, config.features.segment_tokens)
    missing = [sequences[row] for group in groups for row in group]
    tokens = sum(map(len, missing))
    common.say(f"cache: {len(missing)} of {len(set(keys))} sequences ({tokens:,} tokens) are not in the store yet")
    if groups:
        folder = base.resolve(config.model.partial_pretrain, sources["base"]["revision"])
        text = AutoConfig.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code).get_text_config()
        positions = sum(int(row.mask[1:].sum()) for row in missing)
        needed = features.stored_bytes(positions, tokens, text.hidden_size, config.model.dtype)
        common.need_space(collection.folder, needed, "cache")
        common.run_workers(config, "stages.cache", groups)
    start = 0
    for split, rows in responses.items():
        _write(config, split, rows, keys[start : start + len(rows)], collection, sources["base"])
        start += len(rows)


def _work(
    config: Config,
    collection: Collection,
    keys: list[str],
    sequences: list[TokenSequence],
    groups: list[list[int]],
    sources: dict[str, Any],
) -> None:
    """This worker's share of the groups."""
    me = this_worker()
    mine = groups[me.rank :: me.world]
    folder = base.resolve(config.model.partial_pretrain, sources["base"]["revision"])
    model = base.load(config.model, folder, sources["base"]["weights"])
    if me.first:
        features.save_tables(model, collection)
    rows = [(key, row.ids, row.mask) for key, row in zip(keys, sequences, strict=True)]
    total = sum(len(sequences[row]) for group in mine for row in group)
    label = "cache" if me.world == 1 else f"cache (worker 1 of {me.world})"
    with common.progress(total, "tokens", label, shown=me.first) as bar:
        features.produce(model, collection, rows, mine, config.features.codec, bar.update)


def _write(
    config: Config, split: str, rows: list[TokenSequence], keys: list[str], collection: Collection, base: dict[str, Any]
) -> None:
    """The split's manifest."""
    by_base = config.respond.source == "base" and config.respond.temperature == 0
    places, records = collection.find(), collection.records()
    used = list(dict.fromkeys(places[key][0] for key in keys))
    number = {name: index for index, name in enumerate(used)}
    domains = sorted({row.domain for row in rows})
    vocab_size, hidden_size = features.load_tables(collection)["lm_head"].shape
    manifest = Manifest(
        identity=collection.identity,
        base=base,
        dtype=collection.identity["dtype"],
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        segments=used,
        digests=[records[name].digest for name in used],
        segment=[number[places[key][0]] for key in keys],
        row=[places[key][1] for key in keys],
        prompt_length=[row.prompt_length for row in rows],
        written=[by_base and row.prompt_length > 0 for row in rows],
        domain=[domains.index(row.domain) for row in rows],
        domains=domains,
        tokens=sum(map(len, rows)),
        positions=sum(int(row.mask[1:].sum()) for row in rows),
    )
    target = common.features_path(split)
    manifest.save(target)
    size = common.size(sum(records[name].bytes for name in used))
    share = manifest.positions / manifest.tokens
    common.say(
        f"cache {split}: {len(rows)} sequences, {manifest.positions:,} positions ({share:.0%} of {manifest.tokens:,} "
        f"tokens) in {len(used)} segments ({size}) -> {target}"
    )


if __name__ == "__main__":
    cache()

"""respond: the base writes the answers itself, token by token; none is ever written twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from spec import base, corpus, files
from spec.config import Config
from spec.corpus import TokenSequence
from spec.corpus.sequences import Ids
from spec.errors import SpecError
from spec.store import answers
from spec.store.collection import Collection, item_key, plan
from spec.workers import this_worker
from stages import common


@common.worker_option
@common.stage
def respond(config: Config, worker: Path | None) -> None:
    """Let the base write each row's last answer, and write data/responses/SPLIT.parquet."""
    sources = common.read_sources()
    tokens = {split: corpus.read(common.tokens_path(split)) for split in common.SPLITS}
    if config.respond.source == "data":
        for split, rows in tokens.items():
            _write(split, rows, dropped=0)
        return
    asked = [row for rows in tokens.values() for row in rows if row.prompt_length]
    prompts = [row.ids[: row.prompt_length] for row in asked]
    keys = [item_key(prompt) for prompt in prompts]
    identity = answers.identity(sources["base"], config.model.dtype, config.respond)
    collection = Collection(common.store_root(config), "answers", identity)
    if worker is not None:
        _work(config, collection, keys, prompts, files.read_json(worker), sources)
        return
    collection.create()
    groups = plan(
        keys,
        [len(prompt) for prompt in prompts],
        collection.find(),
        base.prompt_bucket,
        config.respond.batch_size,
        cost=lambda length: 1,
    )
    missing = sum(map(len, groups))
    common.say(f"respond: {missing} of {len(set(keys))} answers are to be written by the base")
    if groups:
        common.need_space(collection.folder, missing * (4 * config.respond.max_new_tokens + 64), "respond")
        common.run_workers(config, "stages.respond", groups)
    written = dict(zip(keys, answers.read(collection, keys), strict=True))
    for split, rows in tokens.items():
        answered = [
            _with_answer(row, written[item_key(row.ids[: row.prompt_length])]) if row.prompt_length else row
            for row in rows
        ]
        kept = [row for row in answered if len(row) <= config.data.max_length]
        if not kept:
            raise SpecError(
                f"respond {split}: every row is longer than data.max_length={config.data.max_length} with its answer; "
                "raise it or lower respond.max_new_tokens"
            )
        _write(split, kept, dropped=len(rows) - len(kept))


def _with_answer(row: TokenSequence, answer: Ids) -> TokenSequence:
    """The row with its last answer replaced by the base's."""
    prompt = row.prompt_length
    mask = np.concatenate([row.mask[:prompt], np.ones(len(answer), np.uint8)])
    return replace(row, ids=np.concatenate([row.ids[:prompt], answer]), mask=mask)


def _work(
    config: Config,
    collection: Collection,
    keys: list[str],
    prompts: list[Ids],
    groups: list[list[int]],
    sources: dict[str, dict[str, str]],
) -> None:
    """This worker's share of the groups."""
    me = this_worker()
    mine = groups[me.rank :: me.world]
    folder = base.resolve(config.model.partial_pretrain, sources["base"]["revision"])
    model = base.load(config.model, folder, sources["base"]["weights"])
    most = sum(map(len, mine)) * config.respond.max_new_tokens
    label = "respond" if me.world == 1 else f"respond (worker 1 of {me.world})"
    with common.progress(most, "tokens", label, shown=me.first) as bar:
        answers.produce(model, collection, keys, prompts, mine, config.respond, bar.update)


def _write(split: str, rows: list[TokenSequence], dropped: int) -> None:
    target = common.responses_path(split)
    corpus.write(target, rows)
    supervised = sum(int(row.mask.sum()) for row in rows)
    left = f", {dropped} dropped as too long" if dropped else ""
    size = common.size(target.stat().st_size)
    common.say(f"respond {split}: {len(rows)} sequences, {supervised:,} supervised tokens{left} -> {target} ({size})")


if __name__ == "__main__":
    respond()

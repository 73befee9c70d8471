"""respond: the base writes the answers itself, token by token; none is ever written twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spec import base, corpus
from spec.config import Config
from spec.corpus import TokenSequence
from spec.corpus.sequences import Ids
from spec.errors import SpecError
from spec.serving import require_vllm
from spec.store import answers, identity, index, locks, upkeep
from spec.store.collection import Collection, check_identity
from spec.store.plan import item_key
from spec.workers import this_worker
from stages import common


@common.worker_option
@common.stage
def respond(config: Config, worker: Path | None) -> None:
    """Let the base write each row's last answer, and write data/responses/SPLIT.parquet."""
    sources = common.read_sources()
    tokens = {split: _read(split, sources) for split in common.SPLITS}
    if not config.base_answers:
        for split, rows in tokens.items():
            _write(split, rows, "", common.responses_origin(config, sources, ""))
        return
    if config.respond.engine == "vllm":
        require_vllm()
    asked = {
        split: [row.ids[: row.prompt_length] for row in rows if row.prompt_length] for split, rows in tokens.items()
    }
    prompts = list(itertools.chain.from_iterable(asked.values()))
    plan = None if worker is None else common.read_plan(worker, config)
    computed_in = common.arithmetic_here(config) if plan is None else plan["arithmetic"]
    content = identity.answers(sources["base"], config.model.dtype, config.respond, computed_in)
    collection = Collection(common.store_root(config), "answers", content)
    folder, trusted = common.base_folder(config, sources), config.model.trust_remote_code
    if plan is not None:
        _work(config, collection, prompts, plan["groups"], sources)
        return
    bucket: Callable[[int], int] = base.prompt_bucket
    if config.respond.engine == "transformers":
        bucket = base.prompt_buckets(folder, config.respond.max_new_tokens, trusted)
    stops = base.stop_ids(folder, trusted)
    with locks.in_use(collection.root):
        index.write(collection.root, itertools.chain.from_iterable(tokens.values()))
        groups = answers.plan(prompts, common.known_rows(collection, "respond"), config.respond.batch_size, bucket)
        keys = list(map(item_key, prompts))
        missing = {keys[row] for group in groups for row in group}
        common.say(f"respond: {len(missing)} of {len(set(keys))} answers are to be written by the base")
        if groups:
            common.say_computed_elsewhere(collection, missing, "respond")
            common.need_space(collection.folder, len(missing) * (4 * config.respond.max_new_tokens + 64), "respond")
            common.run_workers(config, "stages.respond", {"arithmetic": computed_in, "groups": groups})
        places, origin = collection.find(), common.responses_origin(config, sources, computed_in)
        for split, rows in tokens.items():
            _complete(config, split, rows, answers.read(collection, asked[split]), stops, origin)
            used = sorted({places[item_key(prompt)][0] for prompt in asked[split]})
            upkeep.add_root(collection.root, common.responses_path(split), {collection.folder.name: used})


def _read(split: str, sources: dict[str, Any]) -> list[TokenSequence]:
    path = common.tokens_path(split)
    check_identity(corpus.read_origin(path), {"tokenizer": sources["base"]["tokenizer"]}, str(path))
    return corpus.read(path)


def _complete(
    config: Config, split: str, rows: list[TokenSequence], written: list[Ids], stops: Set[int], origin: dict[str, Any]
) -> None:
    """Put the answers to their prompts, and write the split."""
    found = iter(written)
    answered = [_with_answer(row, next(found)) if row.prompt_length else row for row in rows]
    kept = [row for row in answered if len(row) <= config.data.max_length]
    if not kept:
        raise SpecError(
            f"respond {split}: every row is longer than data.max_length={config.data.max_length} with its answer; "
            "raise it or lower respond.max_new_tokens"
        )
    cut = sum(int(row.ids[-1]) not in stops for row in kept if row.prompt_length)
    dropped = len(rows) - len(kept)
    notes = f", {dropped} dropped as too long" if dropped else ""
    notes += f", {cut} answers cut at respond.max_new_tokens" if cut else ""
    _write(split, kept, notes, origin)


def _with_answer(row: TokenSequence, answer: Ids) -> TokenSequence:
    """The row with its last answer replaced by the base's."""
    prompt = row.prompt_length
    mask = np.concatenate([row.mask[:prompt], np.ones(len(answer), np.uint8)])
    return replace(row, ids=np.concatenate([row.ids[:prompt], answer]), mask=mask)


def _work(
    config: Config, collection: Collection, prompts: list[Ids], groups: list[list[int]], sources: dict[str, Any]
) -> None:
    """This worker's part."""
    folder = common.base_folder(config, sources)
    answer: answers.Answer
    if config.respond.engine == "vllm":
        from spec.serving import answering  # vLLM is an extra

        me = answering.worker_with_own_device()
        longest = max(len(prompts[row]) for group in groups for row in group) + config.respond.max_new_tokens
        positions = base.limits(folder, config.model.trust_remote_code).most or longest
        engine = answering.Engine(config.model, folder, min(longest, positions))
        answer, producer = engine.answer, engine.producer
    else:
        me = this_worker()
        model = base.load(config.model, folder, sources["base"]["weights"])
        answer, producer = partial(base.answer, model), model.producer
    count = sum(map(len, groups))
    with common.shared_progress(count * config.respond.max_new_tokens, "tokens", "respond", me) as advance:
        estimated = common.Estimated(answer, count // me.world, advance)
        answers.produce(estimated, producer, collection, prompts, groups, config.respond, rank=me.rank, world=me.world)


def _write(split: str, rows: list[TokenSequence], notes: str, origin: dict[str, Any]) -> None:
    target = common.responses_path(split)
    corpus.write(target, rows, origin)
    supervised = sum(int(row.mask.sum()) for row in rows)
    size = common.size(target.stat().st_size)
    common.say(f"respond {split}: {len(rows)} sequences, {supervised:,} supervised tokens{notes} -> {target} ({size})")


if __name__ == "__main__":
    respond()

"""plan: what a run will take, before it takes it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import click
import torch

from spec import base, corpus, costs, files
from spec.config import Config
from spec.corpus import TokenSequence
from spec.costs import Job, Machine
from spec.device import arithmetic, choose_device
from spec.errors import SpecError
from spec.store import features, identity
from spec.store.collection import Collection
from spec.store.features import FeatureRow
from spec.store.plan import item_key
from spec.store.segment import StoreError
from stages import common, embedded


@common.stage
@click.option("--base-params", type=float, help="Plan for a base that is not here: its parameters, such as 8e9.")
@click.option("--hidden", type=int, help="Hidden size of that base.")
@click.option("--vocab", type=int, help="Rows of that base's lm_head.")
@click.option("--tokens", type=float, help="Tokens of all sequences.")
@click.option("--share", type=click.FloatRange(0, 1), default=0.6, show_default=True, help="Share of answer tokens.")
@click.option("--tflops", type=float, help="TFLOP/s of one device in matrix products. [default: measured here]")
@click.option("--bandwidth", type=float, help="GB/s of one device's memory. [default: measured here]")
@click.option("--devices", type=int, default=1, show_default=True, help="How many devices work together.")
def plan(
    config: Config,
    base_params: float | None,
    hidden: int | None,
    vocab: int | None,
    tokens: float | None,
    share: float,
    tflops: float | None,
    bandwidth: float | None,
    devices: int,
) -> None:
    """Print sequences, positions, bytes per codec, time per stage and free space; compute and store nothing.

    It plans for the parameters and data/tokens here, or, with --base-params, --hidden, --vocab and --tokens, for a
    base that is not here yet, by the formulas of docs/scaling.md.
    """
    machine = _machine(config, tflops, bandwidth, devices)
    if any(value is not None for value in (base_params, hidden, vocab, tokens)):
        if base_params is None or hidden is None or vocab is None or tokens is None:
            raise SpecError("for a base that is not here give all of --base-params, --hidden, --vocab and --tokens")
        # The widths of params.yaml are another base's: heads are as wide as this one, over its whole vocabulary.
        speculator = config.model.speculator.as_wide_as(hidden)
        config = config.model_copy(update={"model": config.model.model_copy(update={"speculator": speculator})})
        job = costs.make_job(config, base_params, hidden, vocab, tokens, share * tokens, share * tokens)
        common.say(f"plan: heads of width {hidden:,} over {vocab:,} tokens, {share:.0%} of the tokens in answers")
        _print_bytes(job, job, config)
        _print_times(config, job, job, machine)
    elif embedded.is_embedded(config.model.partial_pretrain) and not common.SOURCES.is_file():
        job = embedded.job(config)
        needed = common.size(_stored_bytes(job, config, config.features.codec))
        common.say(f"plan: {embedded.DOWNLOAD}; the states will take about {needed} in {common.store_root(config)}")
        _print_times(config, job, job, machine)
    else:
        _plan_here(config, machine)


def _machine(config: Config, tflops: float | None, bandwidth: float | None, devices: int) -> Machine:
    if tflops is not None and bandwidth is not None:
        return Machine(tflops * 1e12, bandwidth * 1e9, devices=devices)
    device = choose_device()
    dtype = arithmetic(config.model.dtype, device)
    found = costs.measure(device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    common.say(
        f"plan: this {name} does {found.flops / 1e12:.2f} TFLOP/s in matrix products ({dtype}) "
        f"and reads {found.bandwidth / 1e9:.0f} GB/s"
    )
    flops = found.flops if tflops is None else tflops * 1e12
    return replace(found, flops=flops, bandwidth=bandwidth * 1e9 if bandwidth else found.bandwidth, devices=devices)


def _plan_here(config: Config, machine: Machine) -> None:
    sources, root = common.read_sources(), common.store_root(config)
    meta = base.skeleton(common.base_folder(config, sources), config.model.trust_remote_code)
    text, computed_in = meta.config.get_text_config(), common.arithmetic_here(config)
    prompts, rows = _rows(config, sources)
    content = identity.answers(sources["base"], config.model.dtype, config.respond, computed_in)
    missing_answers = len(set(map(item_key, prompts)) - Collection(root, "answers", content).find().keys())
    unanswered = any(row.prompt_length == len(row) for row in rows)
    stores = features.tap_stores(root, sources["base"], config, computed_in, text.num_hidden_layers)
    cached = [store.collection.find() for store in stores]
    keyed = list(map(FeatureRow.of, rows))
    lacking = {row.key: row for row in keyed if unanswered or any(row.key not in known for known in cached)}
    most, about = (config.respond.max_new_tokens, "at most ") if unanswered else (0, "")

    def count(some: list[FeatureRow]) -> tuple[int, int]:
        """Tokens and positions, of an answer not yet written as many as it may have."""
        return sum(len(row.ids) + most for row in some), sum(int(row.mask[1:].sum()) + most for row in some)

    tokens, positions = count(keyed)
    missing, missing_positions = count(list(lacking.values()))
    common.say(
        f"plan: {len(rows):,} sequences, {about}{tokens:,} tokens, {about}{positions:,} positions to keep "
        f"({positions / max(tokens, 1):.0%}); not in the store yet: {missing_answers:,} answers, {missing:,} tokens"
    )
    to_write = missing_answers * config.respond.max_new_tokens
    shape, layers = (costs.passed_params(meta), text.hidden_size, text.vocab_size), text.num_hidden_layers
    job = costs.make_job(config, *shape, missing, missing_positions, to_write, layers)
    whole = costs.make_job(config, *shape, tokens, positions, to_write, layers)
    _print_bytes(whole, job, config)
    _print_times(config, whole, job, machine)


def _rows(config: Config, sources: dict[str, Any]) -> tuple[list[Any], list[TokenSequence]]:
    """Prompts that are answered, and sequences as they will be cached, as far as their answers are written."""
    tokens: list[TokenSequence] = []
    responses: list[TokenSequence] = []
    for split in common.SPLITS:
        tokens += corpus.read(common.tokens_path(split))
        if common.responses_path(split).is_file():
            with contextlib.suppress(StoreError):
                responses += common.read_responses(config, split, sources)
    prompts = [row.ids[: row.prompt_length] for row in tokens if row.prompt_length and config.base_answers]
    return prompts, responses or tokens


def _stored_bytes(job: Job, config: Config, codec: str) -> float:
    return costs.stored_bytes(job, config.model.dtype, codec, config.features.layer_codec)


def _print_bytes(whole: Job, missing: Job, config: Config) -> None:
    """What all states take by codec, and whether those that are missing will fit."""
    root = common.store_root(config)
    for codec in costs.SIZE:
        chosen = " <- features.codec" if codec == config.features.codec else ""
        size = _stored_bytes(whole, config, codec)
        each = size / max(whole.positions, 1)
        common.say(f"plan: states as {codec}: about {common.size(size)}, {each:,.0f} bytes a position{chosen}")
    free = files.free_bytes(root)
    needed = _stored_bytes(missing, config, config.features.codec)
    enough = "" if needed < free else " - TOO LITTLE"
    common.say(f"plan: to be written: about {common.size(needed)}; free in {root}: {common.size(free)}{enough}")


def _print_times(config: Config, whole: Job, missing: Job, machine: Machine) -> None:
    """What the stages take at the device's full rate, which small models may not reach."""
    epochs = config.trainer.total_epochs
    epoch, looped = costs.epoch_seconds(whole, machine), costs.loop_epoch_seconds(whole, machine)
    if config.base_answers:
        _print_time("respond", costs.answer_seconds(missing, machine), f"{missing.rows} at a time, at full rate")
    _print_time("cache", costs.prefill_seconds(missing, machine), "at full rate")
    _print_time("train", epochs * epoch, f"{epochs} epochs, at full rate")
    common.say(
        f"plan: an epoch with the base in the loop takes {looped / epoch:.1f} x one from the cache; the first "
        "costs the same either way, and every further epoch, head and run saves the difference"
    )


def _print_time(stage: str, seconds: float, how: str) -> None:
    units = (("days", 86400), ("h", 3600), ("min", 60))
    about = next((f"{seconds / length:.1f} {unit}" for unit, length in units if seconds >= length), f"{seconds:.0f} s")
    common.say(f"plan: {stage}: about {about} ({how})")

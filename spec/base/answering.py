"""The base's own answers."""

import logging
from collections.abc import Callable, Sequence
from functools import cache as remembered
from pathlib import Path

import numpy as np
import torch

from spec.base.folder import BaseError
from spec.base.limits import Limits, limits
from spec.base.loading import Base
from spec.base.padding import prompt_bucket
from spec.kv_cache import Memory

log = logging.getLogger(__name__)

LEAST_ROWS = 8
"""A batch that writes has at least so many rows, idle ones if need be: on a CPU bf16 results are the same, bit for
bit, for all batch sizes from a few rows on, but a single row is multiplied by other code."""

COMPACT = 0.75
"""Ended rows are taken out of a batch when at most this share of it still writes."""


def prompt_buckets(folder: Path, max_new_tokens: int, trust_remote_code: bool = False) -> Callable[[int], int]:
    """By the length of a prompt, the padded length at which the base in a folder answers it."""
    found = limits(folder, trust_remote_code)
    return lambda length: _width(length, max_new_tokens, found)


def _width(length: int, max_new_tokens: int, found: Limits) -> int:
    """A prompt's padded length, which leaves room for the answer before the last position."""
    if _stays_alone(length, max_new_tokens, found):
        return length
    return prompt_bucket(length) if found.most is None else min(prompt_bucket(length), found.most - max_new_tokens)


def _stays_alone(length: int, max_new_tokens: int, found: Limits) -> bool:
    """Whether a prompt shares a batch with prompts of its length only: padding would change a recurrent state, or
    there are too few positions for a whole answer."""
    return found.recurrent or (found.most is not None and length + max_new_tokens > found.most)


@torch.inference_mode()
def answer(
    base: Base,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    on_token: Callable[[int], object] = lambda count: None,
) -> list[list[int]]:
    """Let the base continue each prompt until a stop token (kept), max_new_tokens, or its last position.

    Prompts are padded on the left to a common bucketed length; give prompts of one bucket together, so that an
    answer does not depend on its company. Finished rows leave the batch. on_token is called with the number of tokens
    written at each step. A temperature of 0 is greedy; else the seeds, one a prompt, are those of softmax sampling, so
    that an answer follows from its prompt and seed alone.

    Raises:
        BaseError: a prompt that leaves no position for an answer, or with an id for which the base has no row.
    """
    _check_prompts(base, prompts, max_new_tokens)
    found, lengths = base.limits, list(map(len, prompts))
    widths = [_width(length, max_new_tokens, found) for length in lengths]
    alone = [_stays_alone(length, max_new_tokens, found) for length in lengths]
    shared = max((width for width, by_itself in zip(widths, alone, strict=True) if not by_itself), default=0)
    groups: dict[int, list[int]] = {}
    for row, width in enumerate(widths):
        groups.setdefault(width if alone[row] else shared, []).append(row)
    answers: list[list[int]] = [[] for _ in prompts]
    for width, rows in groups.items():
        limit = max_new_tokens if found.most is None else min(max_new_tokens, found.most - width)
        drawn = _uniform([seeds[row] for row in rows] if seeds else [], len(rows), limit if temperature else 0)
        written = _answer_batch(base, [prompts[row] for row in rows], width, limit, temperature, drawn, on_token)
        for row, tokens in zip(rows, written, strict=True):
            answers[row] = tokens
    return answers


def _check_prompts(base: Base, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    rows, positions = int(base.embedding.shape[0]), base.limits.positions
    highest = max(map(max, prompts))
    if highest >= rows:
        raise BaseError(
            f"a prompt has the id {highest}, for which the base has no row (its table has {rows}): its ids come "
            "from another tokenizer, or from one that has more tokens than the base"
        )
    longest = max(map(len, prompts))
    if positions is None or longest + max_new_tokens <= positions:
        return
    if base.limits.hard and longest >= positions:
        raise BaseError(
            f"a prompt has {longest} tokens and the base {positions} positions, which leaves none for an answer: lower "
            "data.max_length, so that such prompts are dropped"
        )
    _warn(positions, base.limits.hard)


@remembered
def _warn(positions: int, hard: bool) -> None:
    effect = "answers end at the last one" if hard else "answers may be worse beyond what the base was trained for"
    log.warning(
        "some prompts with their answers are longer than the base's %d positions: %s; lower data.max_length or "
        "respond.max_new_tokens",
        positions,
        effect,
    )


def _answer_batch(
    base: Base,
    prompts: Sequence[Sequence[int]],
    width: int,
    max_new_tokens: int,
    temperature: float,
    drawn: torch.Tensor,
    on_token: Callable[[int], object],
) -> list[list[int]]:
    """Answers to prompts that are padded to `width`; `drawn` are their uniform numbers [B, max_new_tokens]."""
    device, rows = base.device, len(prompts)
    prompts = [*prompts, *[prompts[0]] * (LEAST_ROWS - rows)]
    pad = base.tokenizer.pad_token_id or 0
    padded = np.full((len(prompts), width), pad if pad < base.vocab_size else 0)
    real = np.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, width - len(prompt) :] = prompt
        real[row, width - len(prompt) :] = 1
    ids, mask = (torch.from_numpy(array).to(device) for array in (padded, real))
    drawn = torch.cat([drawn, drawn.new_ones(len(prompts) - rows, drawn.shape[1])]).to(device)
    memory = Memory(base.model)
    answers: list[list[int]] = [[] for _ in range(rows)]
    stops = base.stop_ids
    # The row that each place of the batch writes; -1 once it has ended.
    active = [*range(rows), *[-1] * (len(prompts) - rows)]
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    for step in range(max_new_tokens):
        seen = {} if base.limits.recurrent else {"attention_mask": mask}  # prompts of a recurrent base have no padding
        logits = memory.forward(ids, position_ids=positions, logits_to_keep=1, **seen)[:, -1]
        if temperature:
            cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
            tokens = torch.searchsorted(cumulative, drawn[:, step, None] * cumulative[:, -1:])[:, 0]
        else:
            tokens = logits.max(-1).indices  # four times as fast as argmax in bf16 on a CPU
        on_token(sum(row >= 0 for row in active))
        for place, token in enumerate(tokens.tolist()):
            if active[place] >= 0:
                answers[active[place]].append(token)
                if token in stops:
                    active[place] = -1
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        going = [place for place, row in enumerate(active) if row >= 0]
        if not going:
            break
        # A smaller batch is faster, but to make it copies the cache.
        if LEAST_ROWS <= len(going) <= COMPACT * len(active) and memory.can_drop_rows:
            keep = torch.tensor(going, device=device)
            active = [active[place] for place in going]
            ids, positions, mask, drawn = ids[keep], positions[keep], mask[keep], drawn[keep]
            memory.keep_rows(keep)
    return answers


def _uniform(seeds: Sequence[int], rows: int, length: int) -> torch.Tensor:
    """Uniform numbers in (0, 1], [rows, length]: a row's follow from its seed alone; rows without a seed are idle."""
    drawn = np.ones((rows, length), np.float32)
    for row, seed in enumerate(seeds):
        drawn[row] = 1 - np.random.default_rng(seed).random(length)  # a token of probability 0 is never met
    return torch.from_numpy(drawn)

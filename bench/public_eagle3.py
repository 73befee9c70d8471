"""EAGLE-3 trained as the public trainers do, written plainly: padded batches, the logits of every depth at once, and
autograd through everything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from bench.recipes import Recipe, plain_optimizer, update
from spec.base import Teacher
from spec.config import Config
from spec.heads import LAST, Packed, supervise
from spec.heads.eagle3 import Eagle3
from spec.store.reader import FeatureReader
from spec.workers import Worker

Batch = tuple[Tensor, ...]
"""ids [B, S + n], the taps' vectors [B, S, taps * d], last states [B, S, d], and what is supervised [B, S, n]."""


def recipe(
    config: Config,
    speculator: Eagle3,
    reader: FeatureReader,
    parts: Sequence[Sequence[int]],
    worker: Worker,
    teacher: Teacher,
    dense: bool,
) -> Recipe:
    """The loss is this project's: the divergence from the teacher over the draft vocabulary.

    `dense`: attention to the earlier depths by masks [S, S + k S]; else by a column a depth, as in EAGLE's own code.
    """
    device, mixed = worker.device, worker.mixed(config.model.dtype)
    batches = [
        (len(packed.starts), padded(speculator, packed, device.type == "cuda")) for packed in reader.batches(parts)
    ]
    taught = teacher.over(speculator.token_map, device, torch.bfloat16 if mixed else torch.float32)
    weights = torch.tensor(speculator.config.head_weights, device=device)
    optimizer = plain_optimizer(config, speculator)

    def step(number: int) -> tuple[int, float]:
        positions, batch = batches[number]
        ids, read, last, supervised = (tensor.to(device, non_blocking=True) for tensor in batch)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
            with torch.no_grad():
                wanted = taught.finish((last.to(taught.lm_head.dtype) @ taught.lm_head.T).float()).softmax(-1)
            losses = []
            for k, logits in enumerate(unrolled(speculator, ids, read, dense)):
                target = F.pad(wanted[:, 1 + k :], (0, 0, 0, 1 + k))
                each = F.kl_div(logits.float().log_softmax(-1), target, reduction="none").sum(-1)  # [B, S]
                losses.append(each[supervised[..., k]].mean())
            loss = (torch.stack(losses) * weights / weights.mean()).mean()
        return positions, update(optimizer, loss)

    return Recipe(optimizer, step)


def at_all_tokens(speculator: Eagle3, packed: Packed) -> tuple[Tensor, Tensor]:
    """The layers' vectors [T, taps * d], and the last states [T, d], zero where none is cached."""
    read = torch.cat([packed.states[tap] for tap in speculator.taps[:-1]], -1)
    last = read.new_zeros(len(packed.ids), packed.states[LAST].shape[1])
    last[packed.starts] = packed.states[LAST]
    return read, last


def padded(speculator: Eagle3, packed: Packed, pin: bool) -> Batch:
    """Sequences side by side, each as long as the longest."""
    n, lengths = speculator.config.n_predict, [end - start for start, end in pairwise(packed.offsets)]
    lined_up = supervise(packed, n, taught=True)
    rows = lined_up.depths < n
    supervised = torch.zeros(len(packed.ids), n, dtype=torch.bool)
    supervised[packed.starts[lined_up.rows[rows]], lined_up.depths[rows]] = True
    read, last = at_all_tokens(speculator, packed)
    ids, read, last, supervised = (
        pad_sequence(list(torch.split(tensor, lengths)), batch_first=True)
        for tensor in (packed.ids, read, last, supervised)
    )
    batch = F.pad(ids, (0, n)), read, last, supervised
    return tuple(tensor.pin_memory() for tensor in batch) if pin else batch


def unrolled(head: Eagle3, ids: Tensor, read: Tensor, dense: bool) -> list[Tensor]:
    """The logits [B, S, K] of every depth."""
    layer, (B, S, _) = head.midlayer, read.shape
    places = torch.arange(S, device=ids.device).repeat(B)
    vectors = head.fc(read.to(head.fc.weight.dtype)).flatten(0, 1)  # [B * S, d]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    found = []
    for k in range(head.config.n_predict):
        pairs = layer.pairs(head.embed_tokens(ids[:, 1 + k :][:, :S].flatten()), vectors)
        queries, (key, value) = layer.queries(pairs, places + k), layer.keys(pairs, places + k)
        copies = queries.shape[1] // key.shape[1]
        keys.append(by_head(key.repeat_interleave(copies, 1), B))
        values.append(by_head(value.repeat_interleave(copies, 1), B))
        mixed = (by_masks if dense else by_columns)(by_head(queries, B), keys, values)
        vectors = layer.finish(vectors, mixed.transpose(1, 2).flatten(0, 1))
        found.append(head.lm_head(head.norm(vectors)).view(B, S, -1))
    return found


def by_head(x: Tensor, count: int) -> Tensor:
    """[B * S, heads, width] of `count` sequences -> [B, heads, S, width]."""
    return x.view(count, -1, *x.shape[1:]).transpose(1, 2)


def by_masks(queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Attention of [B, heads, S, width] to the pairs of every depth, under a dense mask."""
    S = queries.shape[2]
    own = torch.eye(S, dtype=torch.bool, device=queries.device)
    seen = torch.cat([torch.ones_like(own).tril(), *[own] * (len(keys) - 1)], 1)  # [S, S + k S]
    scores = queries @ torch.cat(list(keys), 2).mT / math.sqrt(queries.shape[-1])
    return scores.float().masked_fill(~seen, -torch.inf).softmax(-1).to(queries.dtype) @ torch.cat(list(values), 2)


def by_columns(queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """The same: a matrix for depth 0, and a column for each later one."""
    S, scale = queries.shape[2], 1 / math.sqrt(queries.shape[-1])
    later = torch.ones(S, S, dtype=torch.bool, device=queries.device).triu(1)
    scores = [(queries @ keys[0].mT * scale).float().masked_fill(later, -torch.inf)]
    scores += [(queries * key).sum(-1, keepdim=True) * scale for key in keys[1:]]
    weights = torch.cat(scores, -1).softmax(-1).to(queries.dtype)
    mixed = weights[..., :S] @ values[0]
    for column, value in enumerate(values[1:], S):
        mixed = mixed + weights[..., column, None] * value
    return mixed

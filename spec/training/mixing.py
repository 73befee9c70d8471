"""The mixer's weights (spec.mixer), fitted on answers that nothing was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spec import mixer
from spec.acceptance import Answer, drafts_after, parts
from spec.config import Decode
from spec.drafting import DEEPEST, DEFAULT, Draft, Run, Source, every_source
from spec.heads import Speculator
from spec.lookup import Lookup
from spec.mixer import Weights
from spec.store.reader import FeatureReader

ENOUGH = 10_000
"""About how many places are looked at, at most: those of some answers, drawn at random."""


@torch.inference_mode()
def fit(speculator: Speculator, reader: FeatureReader, decode: Decode, lookup: Lookup | None) -> dict[str, Weights]:
    """The weights by source, fitted to what is proposed for up to DEEPEST places after every token of some answers,
    given that the draft before is right. With few proposals they stay near the defaults."""
    device = next(speculator.parameters()).device
    decode = decode.model_copy(update={"draft_len": DEEPEST, "token_cost": 0.0})  # nothing ends a draft
    kinds = {kind: each for kind, each in every_source(decode, speculator.config, lookup).items() if kind != "head"}
    seen: dict[Source, list[tuple[NDArray[np.float64], NDArray[np.bool_]]]] = {kind: [] for kind in kinds}
    count = -(-len(reader) * ENOUGH // max(reader.manifest.positions, 1))
    chosen = np.random.default_rng(0).permutation(len(reader))[:count].tolist()
    for part in parts(reader, chosen):
        run = partial(speculator.draft_along, part.packed.to(device), part.rows.to(device))
        wanted = [tokens for answer in part.answers for tokens in _following(answer)]
        for kind, sources in kinds.items():
            drafts = [draft for answer in part.answers for draft in drafts_after(answer, sources)]
            seen[kind].append(_proposals(drafts, wanted, run))
    fitted: dict[str, Weights] = {}
    for name, found in seen.items():
        rows = np.concatenate([np.empty((0, mixer.FEATURES)), *(rows for rows, _ in found)])
        right = np.concatenate([np.empty(0, np.bool_), *(right for _, right in found)])
        fitted[name] = mixer.fit(rows, right, DEFAULT[name])
    return {"lookup": fitted["ngram"], **fitted}  # the same without an index


def _following(answer: Answer) -> list[list[int]]:
    """What a draft after each token of an answer would have to be."""
    tokens = answer.ids.tolist()
    return [tokens[end : end + DEEPEST] for end in range(answer.start + 1, len(tokens) + 1)]


def _proposals(
    drafts: Sequence[Draft], wanted: Sequence[Sequence[int]], run: Run
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What is proposed for each place of drafts that are made of the wanted tokens: its features, and whether it is
    right."""
    rows: list[list[float]] = []
    right: list[bool] = []

    def see(draft: Draft, tokens: Sequence[int], head: tuple[int, float] | None = None) -> bool:
        at = len(draft.tokens)
        if at == len(tokens):
            return False
        signals = draft.signals(head)
        for token in {signal[0] for signal in signals if signal is not None}:
            rows.append(mixer.features(token, signals))
            right.append(token == tokens[at])
        draft.take(tokens[at])
        return True

    def choose(tokens: Tensor, probabilities: Tensor) -> Tensor:
        read = tokens.tolist()
        for i, (token, p) in enumerate(zip(tokens.tolist(), probabilities.tolist(), strict=True)):
            if see(drafts[i], wanted[i], (token, p)):
                read[i] = drafts[i].tokens[-1]
        return tokens.new_tensor(read)

    if drafts and drafts[0].sources.depth:
        run(drafts[0].sources.depth, choose)
    else:
        for draft, tokens in zip(drafts, wanted, strict=True):
            while see(draft, tokens):
                pass
    return np.array(rows, np.float64).reshape(-1, mixer.FEATURES), np.array(right, np.bool_)

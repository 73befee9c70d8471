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
from spec.drafting import DEEPEST, Draft, Run, Source, Sources
from spec.heads import Speculator
from spec.lookup import Lookup
from spec.mixer import Weights
from spec.store.reader import SequenceReader

ENOUGH = 10_000
"""Places after which no more answers are read."""


@torch.inference_mode()
def fit(speculator: Speculator, reader: SequenceReader, decode: Decode, lookup: Lookup | None) -> dict[str, Weights]:
    """The weights by source, from what is proposed for up to DEEPEST places after every token of the answers, where the
    draft so far is the answer's own."""
    device = next(speculator.parameters()).device
    decode = decode.model_copy(update={"draft_len": DEEPEST, "token_cost": 0.0})  # nothing ends a draft
    untaught = dict.fromkeys(("ngram", "lookup", "hybrid"), (0.0,) * mixer.FEATURES)
    config = speculator.config.model_copy(update={"mixer": untaught})
    kinds: dict[Source, Sources] = {
        "ngram": Sources(decode, "ngram", config),
        "lookup": Sources(decode, "ngram" if lookup is None else "lookup", config, lookup),
        "hybrid": Sources(decode, "hybrid", config, lookup),
    }
    seen: dict[Source, list[tuple[NDArray[np.float64], NDArray[np.bool_]]]] = {kind: [] for kind in kinds}
    places = 0
    for part in parts(reader):
        run = partial(speculator.draft_along, part.packed.to(device), part.rows.to(device))
        wanted = [tokens for answer in part.answers for tokens in _following(answer)]
        for kind, sources in kinds.items():
            drafts = [draft for answer in part.answers for draft in drafts_after(answer, sources)]
            seen[kind].append(_proposals(drafts, wanted, run))
        places += len(wanted)
        if places >= ENOUGH:
            break
    none = (np.empty((0, mixer.FEATURES)), np.empty(0, np.bool_))
    return {kind: mixer.fit(*map(np.concatenate, zip(none, *found, strict=True))) for kind, found in seen.items()}


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

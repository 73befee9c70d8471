"""Measuring a speculator on held-out prompts: the exact walk over cached features, and the real decoding loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from spec import acceptance
from spec.acceptance import Answer, Walk
from spec.config import Decode
from spec.decoding import Generation, LanguageModelWithSpeculator
from spec.drafting import Source, drafts_along
from spec.heads import Speculator
from spec.store.reader import FeatureReader, SequenceReader
from spec.training.frozen import head_metrics, with_true_inputs
from spec.training.loss import SpeculatorLoss

SOURCES: tuple[Source, ...] = tuple(source for source in get_args(Source) if source != "none")


@dataclass(frozen=True)
class Offline:
    """The exact walk over every answer of a split.

    Attributes:
        walks: by source of drafts, one walk an answer.
        accuracy: of each head alone, fed the true tokens.
    """

    walks: dict[Source, list[Walk]]
    accuracy: list[float]


def offline(
    speculator: Speculator,
    reader: SequenceReader,
    decode: Decode,
    on_positions: Callable[[int], object] = lambda count: None,
) -> Offline:
    """Walk over the answers with each source of drafts; needs no base model."""
    answers = acceptance.draft_answers(speculator, reader, on_positions=on_positions)

    def drafts(source: Source) -> Callable[[Answer], Any]:
        return lambda answer: drafts_along(answer.ids, answer.start, decode, answer.drafts, source)

    walks = {source: acceptance.walks(reader, answers, drafts(source)) for source in SOURCES}
    metrics = head_metrics(with_true_inputs(SpeculatorLoss(speculator), reader, range(len(reader))).numpy())
    n = speculator.config.n_predict
    return Offline(walks, [metrics[f"accuracy.{i + 1}"] for i in range(n)])


@dataclass
class Timed:
    """What one source of drafts took over several prompts."""

    walks: list[Walk] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def add(self, generation: Generation, domain: str) -> None:
        """Count one answer."""
        self.walks.append(Walk(generation.walk.accepted, domain, generation.walk.looping))
        self.tokens += len(generation.tokens)
        self.seconds += generation.prefill_seconds + generation.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """By the wall clock, prefill included."""
        return self.tokens / self.seconds if self.seconds else 0.0


def choose_prompts(reader: FeatureReader, count: int) -> list[int]:
    """Sequences with a prompt, taken from the domains in turn."""
    manifest = reader.manifest
    turns: dict[int, list[int]] = {}
    for index, (domain, length) in enumerate(zip(manifest.domain, manifest.prompt_length, strict=True)):
        if length:
            turns.setdefault(domain, []).append(index)
    ordered = [(place, domain, index) for domain, members in turns.items() for place, index in enumerate(members)]
    return [index for *_, index in sorted(ordered)[:count]]


def decoding(
    model: LanguageModelWithSpeculator,
    reader: FeatureReader,
    indices: Sequence[int],
    max_new_tokens: int,
    on_prompt: Callable[[int], object] = lambda count: None,
) -> dict[str, dict[Source, Timed]]:
    """Decode prompts for real with every source and with none, in the same process and dtype.

    The order of the sources turns by one with each prompt, so that none always runs on a warmer or quieter machine.

    Returns:
        By domain, what each source took.
    """
    manifest = reader.manifest
    everything: list[Source] = ["none", *SOURCES]
    results: dict[str, dict[Source, Timed]] = {}
    for turn, index in enumerate(indices):
        prompt = _prompt(reader, index)
        if turn == 0:
            for source in everything:  # first calls pay for allocations and code paths
                model.generate(prompt, min(8, max_new_tokens), draft=source)
        domain = manifest.domains[manifest.domain[index]]
        timed = results.setdefault(domain, {source: Timed() for source in everything})
        for source in np.roll(np.asarray(everything), turn).tolist():
            timed[source].add(model.generate(prompt, max_new_tokens, draft=source), domain)
        on_prompt(1)
    return results


def lossless(
    model: LanguageModelWithSpeculator, reader: FeatureReader, indices: Sequence[int], max_new_tokens: int
) -> bool:
    """Whether every source writes exactly what plain decoding writes; a claim for float32."""
    for index in indices:
        prompt = _prompt(reader, index)
        plain = model.generate(prompt, max_new_tokens, draft="none").tokens
        if any(model.generate(prompt, max_new_tokens, draft=source).tokens != plain for source in SOURCES):
            return False
    return True


def _prompt(reader: FeatureReader, index: int) -> list[int]:
    ids: list[int] = reader.sequence(index).ids[: reader.manifest.prompt_length[index]].tolist()
    return ids


def summary(
    measured: Offline, timed: dict[str, dict[Source, Timed]], same: bool | None, draft: Source, n_predict: int
) -> dict[str, Any]:
    """Every figure of results/evaluate/metrics.json; docs/metrics.md defines them."""
    head, ngram, hybrid = (measured.walks[source] for source in ("head", "ngram", "hybrid"))
    low, high = acceptance.interval(head)
    total = {source: _together([sources[source] for sources in timed.values()]) for source in ["none", *SOURCES]}
    domains = {}
    for name in sorted({walk.domain for walk in head}):
        inside = [walk for walk in head if walk.domain == name]
        domains[name] = {
            "tokens_per_step": acceptance.tokens_per_step(inside),
            "tokens_per_step_nonlooping": acceptance.tokens_per_step(w for w in inside if not w.looping),
            "ngram_tokens_per_step": acceptance.tokens_per_step(w for w in ngram if w.domain == name),
            "hybrid_tokens_per_step": acceptance.tokens_per_step(w for w in hybrid if w.domain == name),
            "repetition": _share(walk.looping for walk in inside),
            "answers": len(inside),
        }
        if name in timed:
            plain = timed[name]["none"].tokens_per_second
            domains[name]["speedup"] = timed[name][draft].tokens_per_second / plain
    plain = total["none"].tokens_per_second
    return {
        "offline": {
            "tokens_per_step": acceptance.tokens_per_step(head),
            "tokens_per_step_low": low,
            "tokens_per_step_high": high,
            "tokens_per_step_nonlooping": acceptance.tokens_per_step(w for w in head if not w.looping),
            "acceptance": _numbered(acceptance.acceptance(head, n_predict)),
            "accuracy": _numbered(measured.accuracy),
            "answers": len(head),
            "written_by_base": _share(walk.greedy for walk in head),
        },
        "ngram": {"tokens_per_step": acceptance.tokens_per_step(ngram)},
        "hybrid": {"tokens_per_step": acceptance.tokens_per_step(hybrid)},
        "repetition": _share(walk.looping for walk in head),
        "decode": {
            "draft": draft,
            "tokens_per_step": acceptance.tokens_per_step(total[draft].walks),
            "speedup": total[draft].tokens_per_second / plain if plain else None,
            "lossless": same,
            "tokens_per_second": {source: timed.tokens_per_second for source, timed in total.items()},
            "prompts": len(total["none"].walks),
        },
        "domains": domains,
    }


def _together(parts: Sequence[Timed]) -> Timed:
    return Timed(
        [walk for part in parts for walk in part.walks],
        sum(part.tokens for part in parts),
        sum(part.seconds for part in parts),
    )


def _share(flags: Any) -> float:
    values = list(flags)
    return float(np.mean(values)) if values else 0.0


def _numbered(values: Sequence[float]) -> dict[str, float]:
    return {str(index): value for index, value in enumerate(values, 1)}

"""Measuring a speculator on held-out prompts: the exact walk over cached features, and the real decoding loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spec import acceptance
from spec.acceptance import Answer, Walk
from spec.base import Teacher
from spec.decoding import LanguageModelWithSpeculator
from spec.drafting import DEEPEST, Source, Sources
from spec.heads import Speculator
from spec.store.reader import FeatureReader, SequenceReader

TEMPERATURES = (0.6, 1.0)
"""Temperatures at which expected acceptance is reported."""

LENGTHS = tuple(range(1, 13))
"""Draft lengths whose tokens per step are reported."""

SHOWN = 12
"""Domains that tables and pictures show one by one."""


@dataclass(frozen=True)
class Offline:
    """The exact walk over every answer of a split."""

    answers: dict[Source, list[Answer]]  # with what each source drafts after each token
    walks: dict[Source, list[Walk]]  # one an answer
    accuracy: list[float]  # of each head alone, fed the true tokens
    by_length: dict[Source, list[float]]  # tokens per step where drafts are cut to each of LENGTHS
    expected: dict[Source, dict[float, list[float]]]  # acceptance by temperature; empty without a teacher


def offline(
    speculator: Speculator,
    reader: SequenceReader,
    sources: Mapping[Source, Sources],
    teacher: Teacher | None,
    on_positions: Callable[[int], object] = lambda count: None,
) -> Offline:
    """Walk over the answers with each source of drafts; needs no base model.

    on_positions is called with the number of positions just drafted from, by each source, and again when the teacher
    (None where it is not known how the base makes its logits) has judged them.
    """
    n = max(sources["head"].depth, speculator.config.longest_draft or DEEPEST)
    deep = acceptance.draft_answers(speculator, reader, on_positions=on_positions, depth=n)
    heads = [answer.cut(sources["head"].depth) for answer in deep]
    answers: dict[Source, list[Answer]] = {"head": heads}
    for source, what in sources.items():
        if source == "hybrid":
            answers[source] = acceptance.draft_answers(speculator, reader, on_positions=on_positions, sources=what)
        elif source != "head":
            answers[source] = []
            for answer in heads:
                answers[source].append(acceptance.draft_answer(answer, what))
                on_positions(answer.length)
    walks = {source: acceptance.walks(reader, found) for source, found in answers.items()}
    by_length = {source: acceptance.tokens_per_step_by_length(found, LENGTHS) for source, found in answers.items()}
    by_length["head"] = acceptance.tokens_per_step_by_length(deep, LENGTHS[:n])
    expected = {}
    if teacher is not None:
        expected = acceptance.expected_acceptance(reader, teacher, heads, walks, TEMPERATURES, on_positions)
    return Offline(answers, walks, acceptance.accuracy(speculator, reader), by_length, expected)


def cut(answers: Sequence[Answer], reader: SequenceReader, stops: Set[int]) -> float:
    """The share of answers that end without a stop token: they were cut at the greatest length."""
    return _share(int(answer.ids[-1]) not in stops for answer in answers if reader.manifest.prompt_length[answer.index])


def on_paper(
    measured: Offline, reader: FeatureReader, indices: Sequence[int], max_new_tokens: int
) -> dict[Source, list[Walk]]:
    """The walk over the prompts that are decoded for real, up to the same length."""
    wanted = set(indices)
    return {
        source: acceptance.walks(reader, [each for each in answers if each.index in wanted], max_new_tokens)
        for source, answers in measured.answers.items()
    }


@dataclass(frozen=True)
class Timed:
    """One prompt decoded with one source of drafts."""

    walk: Walk
    tokens: int
    seconds: float  # by the wall clock, prefill included


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
) -> dict[Source, list[Timed]]:
    """Decode prompts for real with every source and without drafts, in the same process and dtype; only without drafts
    if the base cannot take drafts back.

    The order of the sources turns by one with each prompt, so that none always runs on a warmer or quieter machine.
    """
    manifest = reader.manifest
    results: dict[Source, list[Timed]] = {"none": []}
    if model.base.limits.takes_back:
        results |= {source: [] for source in model.sources}
    for turn, index in enumerate(indices):
        prompt, domain = prompt_of(reader, index), manifest.domains[manifest.domain[index]]
        if turn == 0:
            for source in results:  # first calls pay for allocations and code paths
                model.generate(prompt, min(8, max_new_tokens), draft=source)
        for source in np.roll(list(results), turn).tolist():
            made = model.generate(prompt, max_new_tokens, draft=source)
            seconds = made.prefill_seconds + made.decode_seconds
            results[source].append(Timed(replace(made.walk, domain=domain), len(made.tokens), seconds))
        on_prompt(1)
    return results


def lossless(
    model: LanguageModelWithSpeculator, reader: FeatureReader, indices: Sequence[int], max_new_tokens: int
) -> bool:
    """Whether every source writes exactly what plain decoding writes; a claim for float32."""
    for index in indices:
        prompt = prompt_of(reader, index)
        plain = model.generate(prompt, max_new_tokens, draft="none").tokens
        if any(model.generate(prompt, max_new_tokens, draft=source).tokens != plain for source in model.sources):
            return False
    return True


def prompt_of(reader: FeatureReader, index: int) -> list[int]:
    """The ids of a sequence before its answer."""
    ids: list[int] = reader.packed([index]).ids[: reader.manifest.prompt_length[index]].tolist()
    return ids


def summary(
    measured: Offline,
    timed: Mapping[Source, Sequence[Timed]],
    paper: Mapping[Source, Sequence[Walk]],
    same: bool | None,
    draft: Source,
) -> dict[str, Any]:
    """Every figure of results/evaluate/details.json; docs/metrics.md defines them. Figures of decoding with drafts are
    absent if nothing was decoded with drafts."""
    head = measured.walks["head"]
    figures = {
        source: _figures(walks, measured.expected.get(source, {}), len(measured.accuracy) if source == "head" else 1)
        for source, walks in measured.walks.items()
    }
    real = _real(timed, paper)
    return {
        "offline": figures["head"]
        | {
            "accuracy": _numbered(measured.accuracy),
            "answers": len(head),
            "written_by_base": _share(walk.greedy for walk in head),
        },
        **{
            source: figures[source] | {"drafted_per_step": acceptance.drafted_per_step(measured.walks[source])}
            for source in figures
            if source != "head"
        },
        "gain": _gain(measured.walks),
        "repetition": _share(walk.looping for walk in head),
        "decode": {
            "draft": draft,
            **{name.removeprefix("decode_"): value for name, value in real.get(draft, {}).items()},
            "lossless": same,
            "tokens_per_second": {source: _rate(made) for source, made in timed.items()},
            "prompts": len(timed["none"]),
            "sources": real,
        },
        "domains": by_domain(measured, timed, paper, draft, {name: {name} for name in sorted(_sizes(measured))}),
    }


def largest(measured: Offline) -> dict[str, set[str]]:
    """The domains that a table or picture has room for: those with most answers, each alone, and the others as one."""
    sizes = _sizes(measured)
    ranked = sorted(sizes, key=lambda name: (-sizes[name], name))
    groups = {_label(name): {name} for name in sorted(ranked[:SHOWN])}
    return groups | ({"others": set(ranked[SHOWN:])} if ranked[SHOWN:] else {})


def by_domain(
    measured: Offline,
    timed: Mapping[Source, Sequence[Timed]],
    paper: Mapping[Source, Sequence[Walk]],
    draft: Source,
    groups: Mapping[str, set[str]],
) -> dict[str, dict[str, Any]]:
    """The figures of each group of domains, counted as one domain."""
    rows: dict[str, dict[str, Any]] = {}
    for label, names in groups.items():
        walked = {source: [w for w in walks if w.domain in names] for source, walks in measured.walks.items()}
        inside = walked["head"]
        rows[label] = _steps(inside) | {
            **{f"{source}_tokens_per_step": acceptance.tokens_per_step(walks) for source, walks in walked.items()},
            "drafted_per_step": acceptance.drafted_per_step(walked["hybrid"]),
            "gain": _gain(walked),
            "repetition": _share(walk.looping for walk in inside),
            "answers": len(inside),
        }
        decoded = {source: [each for each in made if each.walk.domain in names] for source, made in timed.items()}
        if decoded["none"]:
            on_them = {source: [walk for walk in walks if walk.domain in names] for source, walks in paper.items()}
            rows[label] |= _real(decoded, on_them).get(draft, {})
    return rows


def _sizes(measured: Offline) -> Counter[str]:
    return Counter(walk.domain for walk in measured.walks["head"])


def _label(name: str) -> str:
    """A domain's name as one line, quoted where it would be taken for a total or could not be seen."""
    clear = name.isprintable() and name == name.strip() and name not in ("", "all", "others")
    return name if clear and name[0] not in "'\"" else repr(name)


def _steps(walks: Sequence[Walk]) -> dict[str, float]:
    low, high = acceptance.interval(walks)
    return {
        "tokens_per_step": acceptance.tokens_per_step(walks),
        "tokens_per_step_low": low,
        "tokens_per_step_high": high,
        "tokens_per_step_nonlooping": acceptance.tokens_per_step(walk for walk in walks if not walk.looping),
    }


def _figures(walks: Sequence[Walk], expected: dict[float, list[float]], n: int) -> dict[str, Any]:
    """The walk's figures for one source."""
    n = max(n, acceptance.longest(walks))
    figures: dict[str, Any] = _steps(walks) | {
        "acceptance": _numbered(acceptance.acceptance(walks, n)),
        "conditional": _numbered(acceptance.conditional(walks, n)),
        "histogram": _numbered(acceptance.histogram(walks, n), 0),
    }
    if expected:
        figures["sampling"] = {
            str(temperature): {
                "tokens_per_step": acceptance.expected_tokens_per_step(rates),
                "conditional": _numbered(rates),
            }
            for temperature, rates in expected.items()
        }
    return figures


def _real(
    timed: Mapping[Source, Sequence[Timed]], paper: Mapping[Source, Sequence[Walk]]
) -> dict[Source, dict[str, Any]]:
    """By source, the real loop next to the walk over the same prompts."""
    plain = _rate(timed["none"])
    return {
        source: {
            "walk_tokens_per_step": acceptance.tokens_per_step(paper.get(source, [])),
            "decode_tokens_per_step": acceptance.tokens_per_step(each.walk for each in timed[source]),
            "speedup": _rate(timed[source]) / plain if plain else None,
        }
        for source in timed
        if source != "none"
    }


def _rate(timed: Sequence[Timed]) -> float:
    """Tokens per second."""
    return sum(each.tokens for each in timed) / (sum(each.seconds for each in timed) or 1.0)


def _gain(walks: Mapping[Source, Sequence[Walk]]) -> dict[str, float]:
    """What the heads add to lookup, which needs no training: the figures of hybrid minus those of lookup or, without an
    index, of n-grams."""
    hybrid, free = walks["hybrid"], walks.get("lookup", walks["ngram"])
    low, high = acceptance.interval(hybrid, free)
    value = acceptance.tokens_per_step(hybrid) - acceptance.tokens_per_step(free)
    return {"value": value, "low": low, "high": high}


def _share(flags: Any) -> float:
    values = list(flags)
    return float(np.mean(values)) if values else 0.0


def _numbered(values: Sequence[float], start: int = 1) -> dict[str, float]:
    return {str(index): value for index, value in enumerate(values, start)}

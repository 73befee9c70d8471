"""Measuring a speculator on held-out prompts: the exact walk over cached features, and the real decoding loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from torch import Tensor

from spec import acceptance
from spec.acceptance import Answer, Drafts, Walk
from spec.base import PLAIN, Logits
from spec.config import Decode
from spec.decoding import Generation, LanguageModelWithSpeculator
from spec.drafting import Source, drafts_along, head_length
from spec.heads import Speculator
from spec.store.reader import FeatureReader, SequenceReader

SOURCES: tuple[Source, ...] = tuple(source for source in get_args(Source) if source != "none")

TEMPERATURES = (0.6, 1.0)
"""At which expected acceptance is reported."""

LENGTHS = tuple(range(1, 13))
"""Draft lengths whose tokens per step are reported."""

SHOWN = 12
"""Domains that tables and pictures show one by one."""


@dataclass(frozen=True)
class Offline:
    """The exact walk over every answer of a split.

    Attributes:
        answers: with the heads' drafts after each token.
        walks: by source of drafts, one walk an answer.
        accuracy: of each head alone, fed the true tokens.
        by_length: by source, tokens per step with drafts of each of LENGTHS (heads draft n_predict at most).
        expected: by source and temperature, acceptance.expected_acceptance; empty without an lm_head.
    """

    answers: list[Answer]
    walks: dict[Source, list[Walk]]
    accuracy: list[float]
    by_length: dict[Source, list[float]]
    expected: dict[Source, dict[float, list[float]]]


def offline(
    speculator: Speculator,
    reader: SequenceReader,
    decode: Decode,
    lm_head: Tensor | None = None,
    on_positions: Callable[[int], object] = lambda count: None,
    *,
    kind: Logits = PLAIN,
    bias: Tensor | None = None,
) -> Offline:
    """Walk over the answers with each source of drafts; needs no base model.

    Args:
        speculator: whose heads draft.
        reader: of the split.
        decode: where drafts come from.
        lm_head: [V, d] of the base; None where it is not known how its logits follow from it.
        on_positions: called with the number of positions just drafted from, and again when they are judged.
        kind: what turns lm_head times the state into the base's logits.
        bias: [V] of lm_head.
    """
    n = max(head_length(decode, speculator.config), speculator.config.n_predict)
    answers = acceptance.draft_answers(speculator, reader, on_positions=on_positions, n=n)
    walks = {source: acceptance.walks(reader, answers, drafts_of(source, decode)) for source in SOURCES}
    long = decode.model_copy(update={"draft_len": max(LENGTHS)})
    lengths = {source: (decode, LENGTHS[:n]) if source == "head" else (long, LENGTHS) for source in SOURCES}
    by_length = {
        source: acceptance.tokens_per_step_by_length(answers, drafts_of(source, how), cut)
        for source, (how, cut) in lengths.items()
    }
    expected = {}
    if lm_head is not None:
        expected = acceptance.expected_acceptance(
            reader, lm_head, answers, walks, TEMPERATURES, on_positions, kind=kind, bias=bias
        )
    return Offline(answers, walks, acceptance.accuracy(speculator, reader), by_length, expected)


def cut(answers: Sequence[Answer], reader: SequenceReader, stops: Set[int]) -> float:
    """The share of answers that end with no stop token: they were cut at their longest."""
    return _share(int(answer.ids[-1]) not in stops for answer in answers if reader.manifest.prompt_length[answer.index])


def drafts_of(source: Source, decode: Decode) -> Drafts:
    """What a source drafts after each token of an answer."""
    return lambda answer: drafts_along(answer.ids, answer.start, decode, answer.drafts, source)


def on_paper(
    measured: Offline, reader: FeatureReader, decode: Decode, indices: Sequence[int], max_new_tokens: int
) -> dict[Source, list[Walk]]:
    """The walk over the prompts that are decoded for real, as far as they are."""
    wanted = set(indices)
    answers = [answer for answer in measured.answers if answer.index in wanted]
    return {source: acceptance.walks(reader, answers, drafts_of(source, decode), max_new_tokens) for source in SOURCES}


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
    """Decode prompts for real with every source and with none, in the same process and dtype; only with none where
    the base cannot take drafts back.

    The order of the sources turns by one with each prompt, so that none always runs on a warmer or quieter machine.

    Returns:
        By domain, what each source took.
    """
    manifest = reader.manifest
    everything: list[Source] = ["none", *SOURCES] if model.base.limits.takes_back else ["none"]
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
    ids: list[int] = reader.packed([index]).ids[: reader.manifest.prompt_length[index]].tolist()
    return ids


def summary(
    measured: Offline,
    timed: dict[str, dict[Source, Timed]],
    paper: dict[Source, list[Walk]],
    same: bool | None,
    draft: Source,
) -> dict[str, Any]:
    """Every figure of results/evaluate/details.json; docs/metrics.md defines them. Those of decoding with drafts are
    absent where nothing was decoded so."""
    head, ngram, hybrid = (measured.walks[source] for source in ("head", "ngram", "hybrid"))
    figures = {
        source: _figures(walks, measured.expected.get(source, {}), len(measured.accuracy) if source == "head" else 1)
        for source, walks in measured.walks.items()
    }
    total = _all_sources(list(timed.values()))
    real = _real(total, paper)
    return {
        "offline": figures["head"]
        | {
            "accuracy": _numbered(measured.accuracy),
            "answers": len(head),
            "written_by_base": _share(walk.greedy for walk in head),
        },
        "ngram": figures["ngram"],
        "hybrid": figures["hybrid"] | {"gain": _gain(hybrid, ngram)},
        "repetition": _share(walk.looping for walk in head),
        "decode": {
            "draft": draft,
            **_headline(real.get(draft, {})),
            "lossless": same,
            "tokens_per_second": {source: timed.tokens_per_second for source, timed in total.items()},
            "prompts": len(total["none"].walks),
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
    timed: Mapping[str, dict[Source, Timed]],
    paper: Mapping[Source, list[Walk]],
    draft: Source,
    groups: Mapping[str, set[str]],
) -> dict[str, dict[str, Any]]:
    """The figures of each group of domains, whose answers are counted as if they were of one."""
    rows: dict[str, dict[str, Any]] = {}
    for label, names in groups.items():
        inside, lookup, both = (_of(measured.walks[source], names) for source in SOURCES)
        low, high = acceptance.interval(inside)
        rows[label] = {
            "tokens_per_step": acceptance.tokens_per_step(inside),
            "tokens_per_step_low": low,
            "tokens_per_step_high": high,
            "tokens_per_step_nonlooping": acceptance.tokens_per_step(w for w in inside if not w.looping),
            "ngram_tokens_per_step": acceptance.tokens_per_step(lookup),
            "hybrid_tokens_per_step": acceptance.tokens_per_step(both),
            "gain": _gain(both, lookup),
            "repetition": _share(walk.looping for walk in inside),
            "answers": len(inside),
        }
        decoded = [timed[name] for name in names if name in timed]
        if decoded:
            cut = {source: _of(walks, names) for source, walks in paper.items()}
            rows[label] |= _real(_all_sources(decoded), cut).get(draft, {})
    return rows


def _sizes(measured: Offline) -> Counter[str]:
    return Counter(walk.domain for walk in measured.walks["head"])


def _label(name: str) -> str:
    """A domain's name as one line, quoted where it would be taken for a total or could not be seen."""
    clear = name.isprintable() and name == name.strip() and name not in ("", "all", "others")
    return name if clear and name[0] not in "'\"" else repr(name)


def _figures(walks: Sequence[Walk], expected: dict[float, list[float]], n: int) -> dict[str, Any]:
    """The walk's figures for one source."""
    low, high = acceptance.interval(walks)
    n = max(n, acceptance.longest(walks))
    figures = {
        "tokens_per_step": acceptance.tokens_per_step(walks),
        "tokens_per_step_low": low,
        "tokens_per_step_high": high,
        "tokens_per_step_nonlooping": acceptance.tokens_per_step(w for w in walks if not w.looping),
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


def _real(timed: dict[Source, Timed], paper: dict[Source, list[Walk]]) -> dict[Source, dict[str, Any]]:
    """By source, the real loop beside the walk over the same prompts."""
    plain = timed["none"].tokens_per_second
    return {
        source: {
            "walk_tokens_per_step": acceptance.tokens_per_step(paper.get(source, [])),
            "decode_tokens_per_step": acceptance.tokens_per_step(timed[source].walks),
            "speedup": timed[source].tokens_per_second / plain if plain else None,
        }
        for source in SOURCES
        if source in timed
    }


def _headline(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of one source under the names that they have in decode.*."""
    return {name.removeprefix("decode_"): value for name, value in row.items()}


def _gain(walks: Sequence[Walk], baseline: Sequence[Walk]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), acceptance.gain(walks, baseline), strict=True))


def _of(walks: Sequence[Walk], domains: set[str]) -> list[Walk]:
    return [walk for walk in walks if walk.domain in domains]


def _all_sources(parts: Sequence[Mapping[Source, Timed]]) -> dict[Source, Timed]:
    """What each source took in all; those that no part has are left out, but where there is no part at all."""
    everything: list[Source] = ["none", *SOURCES]
    used = [source for source in everything if not parts or source in parts[0]]
    return {source: _together([part[source] for part in parts]) for source in used}


def _together(parts: Sequence[Timed]) -> Timed:
    return Timed(
        [walk for part in parts for walk in part.walks],
        sum(part.tokens for part in parts),
        sum(part.seconds for part in parts),
    )


def _share(flags: Any) -> float:
    values = list(flags)
    return float(np.mean(values)) if values else 0.0


def _numbered(values: Sequence[float], start: int = 1) -> dict[str, float]:
    return {str(index): value for index, value in enumerate(values, start)}

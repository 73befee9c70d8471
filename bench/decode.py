"""Is decoding faster? `python -m bench.decode [PART ...] [--prompts N] [--tokens M]`, after `make repro`.

1. `forms`: each source of drafts next to plain decoding, transformers' generate and its prompt lookup: same base, dtype
   and process, N eval prompts of each domain, the order turning round with each prompt.
2. `lengths`: speed-up against the number of drafted tokens. Draws docs/draft_length.png.
3. `rules`: what n-grams and the hybrid could do: tokens per step on val for each rule, by the exact walk.
4. `profile`: where a step's time goes, and what a forward of several tokens costs.

All four by default; with 8 prompts a domain about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from bench.common import default_config, load_base, machine, reader, table
from spec import acceptance, drafting, heads, plots
from spec.config import Decode
from spec.decoding import LanguageModelWithSpeculator
from spec.device import arithmetic, choose_device, synchronize
from spec.drafting import Drafter, NgramIndex, Source, drafts_along
from spec.evaluation import SOURCES, choose_prompts
from spec.kv_cache import make_cache
from stages import common

LOOKUP_TOKENS = 10
"""prompt_lookup_num_tokens, as transformers' documentation has it."""

LENGTHS = (1, 2, 3, 4, 6, 8, 10, 12)
Prompt = tuple[str, list[int]]
Form = Callable[[list[int]], int]
"""Writes an answer to a prompt, and returns how many tokens it has."""


def main() -> None:
    parts = {"forms": forms, "lengths": lengths, "rules": rules, "profile": profile}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", choices=[*parts, []], help="default: all")
    parser.add_argument("--prompts", type=int, default=8, help="of each domain; rules takes all of val")
    parser.add_argument("--tokens", type=int, default=96, help="at most, of an answer")
    asked = parser.parse_args()
    computed = arithmetic(default_config().model.dtype, choose_device())
    print(f"{machine()}, {torch.get_num_threads()} threads, {computed}")
    for name in asked.part or parts:
        began = time.perf_counter()
        parts[name](asked.prompts, asked.tokens)
        print(f"({time.perf_counter() - began:,.0f} s)", flush=True)


def model(decode: Decode | None = None) -> LanguageModelWithSpeculator:
    config = default_config()
    base = load_base(config)
    speculator = heads.load(common.MODEL, base.device, base.model.dtype, base.tables)
    return LanguageModelWithSpeculator(base, speculator, decode or config.decode)


def prompts(count: int) -> list[Prompt]:
    """(domain, ids) of eval prompts, the domains in turn."""
    found = reader(default_config(), "eval")
    manifest = found.manifest
    return [
        (manifest.domains[manifest.domain[i]], found.packed([i]).ids[: manifest.prompt_length[i]].tolist())
        for i in choose_prompts(found, count * len(set(manifest.domain)))
    ]


def forms(count: int, tokens: int) -> None:
    lm = model()
    lm.base.model.generation_config.pad_token_id = lm.base.tokenizer.pad_token_id or 0

    def ours(source: Source, prompt: list[int]) -> int:
        return len(lm.generate(prompt, tokens, draft=source).tokens)

    @torch.inference_mode()
    def transformers(prompt: list[int], **how: Any) -> int:
        ids = torch.tensor([prompt], device=lm.base.device)
        options = {"do_sample": False, "max_new_tokens": tokens, **how}
        return int(lm.base.model.generate(ids, attention_mask=torch.ones_like(ids), **options).shape[1]) - len(prompt)

    everything: dict[str, Form] = {
        **{f"ours, {source}": partial(ours, source) for source in get_args(Source)},
        "transformers, generate": transformers,
        f"transformers, prompt lookup ({LOOKUP_TOKENS})": partial(transformers, prompt_lookup_num_tokens=LOOKUP_TOKENS),
    }
    given = prompts(count)
    domains, rates = np.array([domain for domain, _ in given]), measure(everything, given)
    rows = []
    for name, found in rates.items():
        ratios = found / rates["ours, none"]
        cells = [ratios[domains == domain] for domain in np.unique(domains)] + [ratios]
        rows.append([name, *map(mean, cells), f"{found.mean():.1f}"])
    print(f"\n1. x plain decoding, of up to {tokens} tokens: mean over {count} prompts a domain (lowest to highest)")
    table(["", *np.unique(domains), "all", "tokens/s"], rows)


def measure(everything: dict[str, Form], given: Sequence[Prompt]) -> dict[str, NDArray[np.float64]]:
    """Tokens/s of every form on every prompt, prefill included; order turns round with each prompt."""
    for run in everything.values():  # first calls pay for allocations and code paths
        run(given[0][1])
    rates: dict[str, list[float]] = {name: [] for name in everything}
    for turn, (_, prompt) in enumerate(given):
        for name in everything if turn % 2 == 0 else reversed(everything):
            began = time.perf_counter()
            written = everything[name](prompt)
            rates[name].append(written / (time.perf_counter() - began))
    return {name: np.array(found) for name, found in rates.items()}


def mean(values: NDArray[np.float64]) -> str:
    """Mean (lowest to highest)."""
    return f"{values.mean():.2f} ({values.min():.2f} to {values.max():.2f})"


def lengths(count: int, tokens: int) -> None:
    lm = model()
    assert lm.speculator is not None
    n = lm.speculator.config.n_predict

    def run(source: Source, length: int | None, prompt: list[int]) -> int:
        lm.decode = default_config().decode.model_copy(update={"draft_len": length})
        return len(lm.generate(prompt, tokens, draft=source).tokens)

    everything: dict[str, Form] = {"none": partial(run, "none", None)}
    for source in SOURCES:
        for length in (*[k for k in LENGTHS if source != "head" or k <= n], None):
            everything[f"{source} {length}"] = partial(run, source, length)
    rates = measure(everything, prompts(max(1, count // 4)))
    means = {name: float((found / rates["none"]).mean()) for name, found in rates.items()}
    lines: Any = {}
    rows = []
    for source in SOURCES:
        known = [k for k in LENGTHS if f"{source} {k}" in means]
        lines[source] = (known, [means[f"{source} {k}"] for k in known])
        found = [means.get(f"{source} {k}") for k in (*LENGTHS, None)]
        rows.append([source, *("" if each is None else f"{each:.2f}" for each in found)])
    plots.curves(Path("docs/draft_length.png"), lines, "drafted tokens a step, at most", "x plain decoding")
    print(f"\n2. x plain decoding by draft_len, mean over {len(rates['none'])} prompts -> docs/draft_length.png")
    table(["", *map(str, LENGTHS), "null"], rows)


def rules(count: int, tokens: int) -> None:
    lm = model()
    costs = forward_seconds(lm)
    per_token = (costs[13] / costs[1] - 1) / 12
    found = reader(default_config(), "val")
    assert lm.speculator is not None
    answers = acceptance.draft_answers(lm.speculator, found)
    rows = []

    def walked(name: str, decode: Decode, source: Any, **constants: Any) -> None:
        drafted: list[int] = []
        walks = []
        with ExitStack() as stack:
            for key, value in constants.items():
                target = Drafter if key == "follow" else drafting
                stack.enter_context(mock.patch.object(target, key, value))
            for answer in answers:
                drafts = list(drafts_along(answer.ids, answer.start, decode, answer.drafts, source))
                steps = acceptance.walk(answer.matches(drafts), answer.length)
                walks.append(acceptance.Walk(steps))
                stops = np.cumsum([0, *(steps[:-1] + 1)])
                drafted += [min(len(drafts[at]), answer.length - 1 - at) for at in stops[: len(steps)]]
        rate, each = acceptance.tokens_per_step(walks), float(np.mean(drafted))
        rows.append([name, f"{rate:.3f}", f"{each:.1f}", f"{rate / (1 + per_token * each):.3f}"])

    alone: Any = {"follow": lambda self, limit, drafted: drafted}
    default = Decode()

    old = partial(Decode, ngram_max=4)

    walked("head", default, "head")
    for shortest in (1, 2, 3):
        walked(f"n-gram of {shortest} to 4 tokens, 6 drafted", old(ngram_min=shortest, draft_len=6), "ngram")
    for factor in (2, 3, 4):
        walked(f"n-gram of 1 to 8 tokens, {factor} drafted for each", default, "ngram", PER_TOKEN=factor)
    for strong in (1, 2, 3, 4):
        name = f"n-gram of {strong} to 4 tokens, 6 drafted; else head"
        walked(name, old(ngram_min=1, draft_len=6), "hybrid", STRONG=strong, **alone)
    for length in (4, 8, 10):
        walked(
            f"n-gram of 2 to 4 tokens, {length} drafted; else head",
            old(ngram_min=1, draft_len=length),
            "hybrid",
            **alone,
        )
    walked("n-gram of 2 to 8 tokens, 3 drafted for each; else head", default, "hybrid", **alone)
    for longest in (4, 8, 16):
        walked(f"2 to {longest}, 3 for each, lookup behind the head's drafts", Decode(ngram_max=longest), "hybrid")
    for strong in (1, 3):
        walked(f"{strong} to 8, 3 for each, lookup behind the head's drafts", default, "hybrid", STRONG=strong)
    for factor in (2, 4):
        walked(f"2 to 8, {factor} for each, lookup behind the head's drafts", default, "hybrid", PER_TOKEN=factor)
    print(
        "\n3. Rules: the exact walk on val, and what it comes to where a drafted token costs "
        f"{per_token:.1%} of a forward (measured; the heads' own time left out)"
    )
    table(["rule", "tokens per step", "drafted a step", "x plain, estimated"], rows)


def profile(count: int, tokens: int) -> None:
    lm = model()
    given = prompts(max(1, count // 4))
    sources: tuple[Source, ...] = ("none", "head", "hybrid")
    columns = [where_time_goes(lm, [prompt for _, prompt in given], tokens, source) for source in sources]
    print("\n4. Where a step's time goes: ms a step (share)")
    rows = [[name, *[f"{1e3 * c[name]:.2f} ({c[name] / c['a step']:.1%})" for c in columns]] for name in columns[0]]
    table(["", *sources], rows)
    costs = forward_seconds(lm)
    print("\nA forward of several tokens, after 200 others")
    rows = [["ms", *(f"{1e3 * took:.1f}" for took in costs.values())]]
    table(
        ["tokens", *map(str, costs)], [*rows, ["x one token", *(f"{took / costs[1]:.2f}" for took in costs.values())]]
    )


def where_time_goes(
    lm: LanguageModelWithSpeculator, prompts: Sequence[list[int]], tokens: int, source: Source
) -> dict[str, float]:
    """Seconds of each part of a decoding step, the mean over all steps; "a step" is their sum.

    On a GPU the clocks wait for the device after each part. "unclocked" is what a step takes without them.
    """
    spent = dict.fromkeys(("layers", "lm_head", "heads", "n-grams"), 0.0)

    def run(clocks: Callable[[], AbstractContextManager[None]]) -> tuple[int, float]:
        steps, whole = 0, 0.0
        for prompt in prompts:
            stream = lm.stream(prompt, tokens, draft=source)
            next(stream)  # the prefill
            with clocks():
                began = time.perf_counter()
                steps += sum(1 for _ in stream)
                whole += time.perf_counter() - began
        return max(steps, 1), whole

    run(nullcontext)  # first calls pay for allocations and code paths
    _, unclocked = run(nullcontext)
    steps, whole = run(partial(_clocked, lm, spent))
    spent["everything else"] = whole - sum(spent.values())
    return {name: each / steps for name, each in {**spent, "a step": whole, "unclocked": unclocked}.items()}


@contextmanager
def _clocked(lm: LanguageModelWithSpeculator, spent: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds of each part while the block runs; parts do not contain each other."""

    def clock(function: Any, name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize(lm.base.device)
                spent[name] += time.perf_counter() - began

        return run

    session = None if lm.speculator is None else type(lm.speculator.session())
    with ExitStack() as stack:
        for target, attribute, name in (
            (lm.base.model.get_decoder(), "forward", "layers"),
            (lm.base.model.get_output_embeddings(), "forward", "lm_head"),
            (session, "extend", "heads"),
            (session, "draft", "heads"),
            (NgramIndex, "draft", "n-grams"),
            (NgramIndex, "extend", "n-grams"),
        ):
            stack.enter_context(mock.patch.object(target, attribute, clock(getattr(target, attribute), name)))
        yield


def forward_seconds(lm: LanguageModelWithSpeculator) -> dict[int, float]:
    """Of a forward of so many tokens after a context of 200: the median of seven rounds' best of five."""
    network, device = lm.base.model, lm.base.device
    ids = torch.arange(200, device=device)[None]
    found: dict[int, list[float]] = {}
    with torch.inference_mode():
        cache = make_cache(network.config)
        network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for _ in range(7):
            for k in (1, 2, 4, 7, 10, 13, 25):
                times = []
                for _ in range(5):
                    began = time.perf_counter()
                    network(input_ids=ids[:, :k], past_key_values=cache, use_cache=True, logits_to_keep=k)
                    synchronize(device)
                    times.append(time.perf_counter() - began)
                    cache.crop(-k)
                found.setdefault(k, []).append(min(times))
    return {k: statistics.median(times) for k, times in found.items()}


if __name__ == "__main__":
    main()

"""Is decoding faster? `python -m bench.decode [PART ...] [--prompts N] [--tokens M]`, after `make repro`.

1. `forms`: each source of drafts next to plain decoding, transformers' generate and its prompt lookup: same base, dtype
   and process, N eval prompts of each domain, the order turning round with each prompt.
2. `costs`: what each source drafts on val by decode.token_cost, by the exact walk; and what a drafted token costs here.
3. `profile`: where a step's time goes, and what a forward of several tokens costs.

All three by default; with 8 prompts a domain about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, get_args
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from bench.common import default_config, load_base, machine, reader, table
from spec import acceptance, decoding, drafting, heads
from spec.config import Decode
from spec.decoding import LanguageModelWithSpeculator
from spec.device import arithmetic, choose_device, synchronize
from spec.drafting import Source, open_lookup
from spec.evaluation import choose_prompts, prompt_of
from spec.kv_cache import make_cache
from stages import common

LOOKUP_TOKENS = 10
"""prompt_lookup_num_tokens, as transformers' documentation has it."""

COSTS = (0.01, 0.02, 0.03, 0.04, 0.06, 0.1)
Prompt = tuple[str, list[int]]
Form = Callable[[list[int]], int]
"""Writes an answer to a prompt, and returns how many tokens it has."""


def main() -> None:
    parts = {"forms": forms, "costs": costs, "profile": profile}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", choices=[*parts, []], help="default: all")
    parser.add_argument("--prompts", type=int, default=8, help="of each domain; costs takes all of val")
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
    lookup = open_lookup(common.MODEL, speculator.config)
    return LanguageModelWithSpeculator(base, speculator, decode or config.decode, lookup)


def prompts(count: int) -> list[Prompt]:
    """(domain, ids) of eval prompts, the domains in turn."""
    found = reader(default_config(), "eval")
    manifest = found.manifest
    return [
        (manifest.domains[manifest.domain[i]], prompt_of(found, i))
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


def costs(count: int, tokens: int) -> None:
    lm = model()
    took = forward_seconds(lm)
    per_token = (took[13] / took[1] - 1) / 12
    found, lookup = reader(default_config(), "val"), lm.lookup
    assert lm.speculator is not None
    rows = []
    for cost in COSTS:
        decode = default_config().decode.model_copy(update={"token_cost": cost})
        for source, sources in drafting.every_source(decode, lm.speculator.config, lookup).items():
            answers = acceptance.draft_answers(lm.speculator, found, sources=sources)
            walks = acceptance.walks(found, answers)
            rate, drafted = acceptance.tokens_per_step(walks), acceptance.drafted_per_step(walks)
            rows.append([cost, source, f"{rate:.3f}", f"{drafted:.1f}", f"{rate / (1 + per_token * drafted):.3f}"])
    print(
        "\n2. decode.token_cost: the exact walk on val, and what it comes to where a drafted token costs "
        f"{per_token:.1%} of a forward (measured; the heads' own time left out)"
    )
    table(["token_cost", "source", "tokens per step", "drafted a step", "x plain, estimated"], rows)


def profile(count: int, tokens: int) -> None:
    lm = model()
    given = prompts(max(1, count // 4))
    sources: tuple[Source, ...] = ("none", "head", "hybrid")
    columns = [where_time_goes(lm, [prompt for _, prompt in given], tokens, source) for source in sources]
    print("\n3. Where a step's time goes: ms a step (share)")
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
    spent = dict.fromkeys(("layers", "lm_head", "drafts"), 0.0)

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

    with ExitStack() as stack:
        for target, attribute, name in (
            (lm.base.model.get_decoder(), "forward", "layers"),
            (lm.base.model.get_output_embeddings(), "forward", "lm_head"),
            (decoding, "complete", "drafts"),
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

"""What does a speculator give in vLLM? `python -m bench.serve [CHECKPOINT ...]`, after `make repro`, in .venv-vllm.

tokens/s of vLLM's own server, asked over HTTP by 1, 2, 4 and 8 clients at a time with prompts of the eval split, each
prompt once: the base alone, vLLM's n-gram and (where arctic-inference is installed) suffix decoding, then each
checkpoint's drafts. Suffix decoding remembers what its server wrote: it is asked the training prompts before.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.common import default_config, machine, reader, table
from spec import heads
from spec.config import Decode, DraftSource
from spec.evaluation import prompt_of
from spec.serving import server as servers
from spec.serving.server import NGRAM_DRAFT, Server
from stages import common

PROMPTS = 8  # for each number of clients, others each time
WARM = 4  # prompts of val before the clock runs
NEW_TOKENS = 64
CLIENTS = (1, 2, 4, 8)
SUFFIX = "vLLM's suffix decoding, after the training prompts"
NGRAMS = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}  # vLLM's own takes 5 unless told
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


def main() -> None:
    print(machine())
    config = default_config()
    splits = {split: reader(config, split) for split in ("train", "val", "eval")}
    prompts = [prompt_of(splits["eval"], i) for i in range(PROMPTS * len(CLIENTS))]
    warm = [prompt_of(splits["val"], i) for i in range(WARM)]
    checkpoints = list(map(Path, sys.argv[1:])) or [common.MODEL]
    shape = heads.read_config(checkpoints[0])
    base = shape.base_model_name_or_path
    alone = servers.plain_command(base, shape.base_revision, dtype=config.model.dtype)

    def by_vllm(method: str, **options: int) -> list[str]:
        return [*alone, "--speculative-config", json.dumps({"method": method, **options})]

    commands = {
        "base alone": alone,
        "vLLM's n-gram": by_vllm("ngram", num_speculative_tokens=NGRAM_DRAFT, **NGRAMS),
    }
    if importlib.util.find_spec("arctic_inference"):
        commands[SUFFIX] = by_vllm("suffix")
    for checkpoint in checkpoints:
        method = heads.read_config(checkpoint).method
        sources: list[DraftSource] = ["head"] if method == "eagle3" else ["lookup", "head", "hybrid"]
        for source in sources:
            decode = Decode(draft=source, token_cost=config.decode.token_cost)
            name = f"{checkpoint}, {method}: {source}"
            commands[name] = servers.command(checkpoint, decode, base=base, dtype=config.model.dtype)
    rates: dict[str, list[float]] = {}
    rows = []
    for name, command in commands.items():
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            more = ("--enforce-eager", "--max-model-len", "1024")
            with Server([*command, *more], Path(folder) / "log", ENVIRONMENT) as server:
                if name == SUFFIX:
                    earlier = [prompt_of(splits["train"], i) for i in range(len(splits["train"]))]
                    ask_all(server, base, earlier, max(CLIENTS), config.respond.max_new_tokens)
                ask_all(server, base, warm, 1)
                rates[name], accepted, ratio = measure(server, base, prompts)
        pairs = zip(rates[name], rates["base alone"], strict=True)
        shown = [f"{rate:.1f} ({rate / plain:.2f})" for rate, plain in pairs]
        rows.append([name, *shown, f"{accepted:.2f}" if name != "base alone" else "-", f"{ratio:.2f}"])
        print(rows[-1], flush=True)
    header = ["tokens/s (x base alone) at", *(f"{count} at a time" for count in CLIENTS)]
    table([*header, "mean acceptance length", "tokens per step"], rows)
    threads = os.environ.get("OMP_NUM_THREADS")
    print(f"{len(prompts)} prompts of at most {NEW_TOKENS} new tokens, {config.model.dtype}, OMP_NUM_THREADS {threads}")


def measure(server: Server, name: str, prompts: Sequence[Sequence[int]]) -> tuple[list[float], float, float]:
    """tokens/s for each number of clients; vLLM's mean acceptance length; tokens written for each step of a request."""
    before, rates = server.counters(), []
    for place, count in enumerate(CLIENTS):
        part = prompts[place * PROMPTS : (place + 1) * PROMPTS]
        began = time.perf_counter()
        written = ask_all(server, name, part, count)
        rates.append(written / (time.perf_counter() - began))
    after = server.counters()
    counters = ("vllm:generation_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")
    generated, accepted = (after.get(name, 0.0) - before.get(name, 0.0) for name in counters)
    decoded = generated - len(prompts)  # the prefill gives each answer's first token
    steps = decoded - accepted  # a step gives one token of the base's own beside those accepted
    return rates, servers.mean_acceptance_length(before, after), decoded / steps


def ask_all(server: Server, name: str, prompts: Sequence[Sequence[int]], clients: int, length: int = NEW_TOKENS) -> int:
    """Let so many clients at a time ask for the answers; how many tokens these have together."""
    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(lambda prompt: ask(server, name, prompt, length), prompts))


def ask(server: Server, name: str, prompt: Sequence[int], length: int) -> int:
    """Write an answer; how many tokens it has."""
    body: dict[str, Any] = {"model": name, "prompt": list(prompt), "max_tokens": length, "temperature": 0}
    header = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), header)
    with urllib.request.urlopen(request, timeout=3600) as answer:
        count: int = json.load(answer)["usage"]["completion_tokens"]
    return count


if __name__ == "__main__":
    main()

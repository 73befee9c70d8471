"""What does a speculator give in vLLM? `python -m bench.serve`, after `make repro`, in .venv-vllm.

tokens/s of vLLM's own server, asked over HTTP by 1, 2, 4 and 8 clients at a time with prompts of the eval split: the
base alone, vLLM's n-gram lookup, our heads, our hybrid (but of eagle3). Each server is asked everything once before it
is timed.
"""

from __future__ import annotations

import json
import os
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
from spec.serving import server as servers
from spec.serving.server import NGRAM_DRAFT, Server
from stages import common

PROMPTS = 8
NEW_TOKENS = 64
CLIENTS = (1, 2, 4, 8)
NGRAMS = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}  # vLLM's own takes 5 unless told
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


def main() -> None:
    print(machine())
    config = default_config()
    found = reader(config, "eval")
    lengths = found.manifest.prompt_length
    prompts = [sequence.ids[: lengths[i]].tolist() for i, sequence in found.sequences(range(PROMPTS))]
    shape = heads.read_config(common.MODEL)
    base = shape.base_model_name_or_path
    sources: list[DraftSource] = ["head"] if shape.method == "eagle3" else ["head", "hybrid"]
    alone = servers.plain_command(base, shape.base_revision, dtype=config.model.dtype)
    ngram = json.dumps({"method": "ngram", "num_speculative_tokens": NGRAM_DRAFT, **NGRAMS})
    commands: dict[str, list[str]] = {
        "base alone": alone,
        "vLLM's n-gram": [*alone, "--speculative-config", ngram],
        **{source: servers.command(common.MODEL, Decode(draft=source), dtype=config.model.dtype) for source in sources},
    }
    rates: dict[str, list[float]] = {}
    rows = []
    for name, command in commands.items():
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            more = ("--enforce-eager", "--max-model-len", "1024")
            with Server([*command, *more], Path(folder) / "log", ENVIRONMENT) as server:
                rates[name], accepted, ratio = measure(server, base, prompts)
        shown = [
            f"{rate:.1f} ({rate / plain:.2f})" for rate, plain in zip(rates[name], rates["base alone"], strict=True)
        ]
        rows.append([name, *shown, f"{accepted:.2f}" if name != "base alone" else "-", f"{ratio:.2f}"])
        print(rows[-1], flush=True)
    header = ["tokens/s (x base alone) at", *(f"{count} at a time" for count in CLIENTS)]
    table([*header, "mean acceptance length", "tokens per step"], rows)
    threads = os.environ.get("OMP_NUM_THREADS")
    print(f"{PROMPTS} prompts of at most {NEW_TOKENS} new tokens, {config.model.dtype}, OMP_NUM_THREADS {threads}")


def measure(server: Server, name: str, prompts: Sequence[Sequence[int]]) -> tuple[list[float], float, float]:
    """tokens/s for each number of clients; vLLM's mean acceptance length; tokens written for each step of a request."""
    for prompt in prompts:
        ask(server, name, prompt)
    before, rates = server.counters(), []
    for count in CLIENTS:
        began = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            written = sum(pool.map(lambda prompt: ask(server, name, prompt), prompts))
        rates.append(written / (time.perf_counter() - began))
    after = server.counters()
    generated = after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    accepted = difference(before, after, "vllm:spec_decode_num_accepted_tokens_total")
    decoded = generated - len(CLIENTS) * len(prompts)  # the prefill gives each answer's first token
    steps = decoded - accepted  # a step gives one token of the base's own beside those accepted
    return rates, servers.mean_acceptance_length(before, after), decoded / steps


def difference(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after.get(name, 0.0) - before.get(name, 0.0)


def ask(server: Server, name: str, prompt: Sequence[int]) -> int:
    """Write an answer; how many tokens it has."""
    body: dict[str, Any] = {"model": name, "prompt": list(prompt), "max_tokens": NEW_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=3600) as answer:
        count: int = json.load(answer)["usage"]["completion_tokens"]
    return count


if __name__ == "__main__":
    main()

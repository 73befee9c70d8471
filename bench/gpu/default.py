"""The embedded default, from fetch to evaluate, by the stages themselves."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.gpu.check import Check
from spec import config as config_module
from spec import corpus, files
from stages import common

STAGES = ("fetch", "tokenize", "respond", "cache", "train", "evaluate")


def workspace(check: Check) -> Path:
    """The folder in which the stages run."""
    return check.work / "default"


def run(check: Check) -> None:
    """Run all stages, with what params.yaml says."""
    root = workspace(check)
    took = run_stages(check, STAGES)
    rows = [row for split in common.SPLITS for row in corpus.read(root / common.responses_path(split))]
    answers = sum(len(row) - row.prompt_length for row in rows)
    check.figure("respond, tokens of answers/s, start included", f"{answers / took['respond']:,.0f}")
    check.figure("cache, tokens/s, start included", f"{sum(map(len, rows)) / took['cache']:,.0f}")


def run_stages(check: Check, stages: Sequence[str], *overrides: str) -> dict[str, float]:
    """Run stages in a folder of their own, and write down what they came to; the seconds of each. What they say is kept
    in stages.txt."""
    root = workspace(check)
    root.mkdir(parents=True, exist_ok=True)
    given = (*overrides, "trainer.logger=console", f"features.store={root / 'store'}", *check.sizes.default)
    config_module.save(config_module.load(common.PROJECT / "params.yaml", given), root / "params.yaml")
    took: dict[str, float] = {}
    with _highest_memory(check.device) as highest, (check.out / "stages.txt").open("a") as log:
        for stage in stages:
            began = time.perf_counter()
            command, environment = [sys.executable, "-m", f"stages.{stage}"], common.child_environment()
            options: Any = {"cwd": root, "env": environment, "timeout": check.left()}
            if subprocess.run(command, stdout=log, stderr=log, **options).returncode:
                text = (check.out / "stages.txt").read_text()
                raise RuntimeError(f"the stage {stage} failed; the end of stages.txt: {text[-2000:]}")
            took[stage] = time.perf_counter() - began
            check.figure(f"{stage}, s", f"{took[stage]:.1f}")
    metrics = files.read_json(root / "results/evaluate/details.json")
    rates = [metrics[source]["tokens_per_step"] for source in ("offline", "ngram", "hybrid")]
    check.figure("tokens per step: head, n-gram, hybrid", ", ".join(f"{rate:.2f}" for rate in rates))
    speeds = metrics["decode"]["tokens_per_second"]
    check.figure(f"decoding, tokens/s: {', '.join(speeds)}", ", ".join(f"{speed:.1f}" for speed in speeds.values()))
    check.figure("speed-up of decoding", f"{metrics['decode']['speedup']:.2f}")
    check.figure("identical to plain decoding in float32", "yes" if metrics["decode"]["lossless"] else "NO", "yes")
    check.figure("highest device memory, GB", f"{highest[0] / 1e9:.2f}")
    return took


@contextmanager
def _highest_memory(device: torch.device) -> Iterator[list[int]]:
    """The most bytes that other processes take on the device (on a CPU: that this process's children take)."""
    highest, done = [0], threading.Event()
    before = _used(device)

    def watch() -> None:
        while not done.wait(0.1):
            highest[0] = max(highest[0], _used(device) - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        done.set()
        thread.join()


def _used(device: torch.device) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    used = 0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            used += child.memory_info().rss
    return used

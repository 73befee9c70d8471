"""The formulas of docs/scaling.md beside what is measured. `python -m bench.costs [NAME ...]`, after `make repro`.

Each line measures the machine's rates (matrix products, copies) and the work in turn, three times, so that other work
on the machine weighs on both; `measured / formula` is the median, with the lowest and the highest. NAME: only those
that begin with it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from bench import train
from bench.common import default_config, load_base, machine, reader, seconds, spread, table
from spec import base as base_model
from spec import costs, files
from spec.costs import Machine
from spec.device import synchronize
from spec.store import features
from stages import common

ROUNDS = 3
ROWS, STEPS = 128, 8


def main() -> None:
    wanted = tuple(sys.argv[1:])
    print(machine())
    config = default_config()
    base = load_base(config)
    manifest = reader(config, "train").manifest
    count = costs.passed_params(base.model)
    job = costs.make_job(config, count, base.hidden_size, base.vocab_size, manifest.tokens, manifest.positions, 0)
    job = replace(job, rows=ROWS)
    dtype = base.model.dtype

    split = files.read_json(common.CACHE_RESULTS / common.DETAILS)["train"]
    stored = split["bytes_per_position"] * split["positions"]
    formula = costs.stored_bytes(job, config.model.dtype, config.features.codec, config.features.layer_codec)
    rows = [["disk: the train split", common.size(formula), common.size(stored), f"{stored / formula:.3f}"]]

    width = 256
    ids = torch.randint(base.vocab_size, (features.BATCH_TOKENS // width // 2, width), device=base.device)
    prompts = ids[:, :32].repeat(-(-ROWS // len(ids)), 1)[:ROWS].tolist()

    def prefill() -> float:
        with torch.inference_mode():
            began = time.perf_counter()
            base_model.hidden_states(base.model, ids)
            synchronize(base.device)
            return time.perf_counter() - began

    def step() -> float:
        """Of ROWS answers, without the pass over their prompts."""
        few, many = (seconds(partial(base_model.answer, base, prompts, n)) for n in (2, 2 + STEPS))
        return (many - few) / STEPS

    def train_step() -> float:
        form = {"form": "ours", "drafted": config.model.speculator.draft_vocab_size, "loss": config.optim.loss}
        return 1000 / train.one(form)["rate"]

    works: list[tuple[str, Callable[[Machine], float], Callable[[], float]]] = [
        (f"cache: {ids.numel():,} tokens", partial(costs.prefill_seconds, replace(job, tokens=ids.numel())), prefill),
        (
            f"respond: a token of each of {ROWS} answers",
            partial(costs.answer_seconds, replace(job, answers=ROWS)),
            step,
        ),
        (
            f"train, optim.loss={config.optim.loss}: 1,000 positions",
            partial(costs.epoch_seconds, replace(job, positions=1000)),
            train_step,
        ),
    ]
    for name, said, work in works:
        if wanted and not name.startswith(wanted):
            continue
        formulas, measured = [], []
        for _ in range(ROUNDS):
            formulas.append(said(costs.measure(base.device, dtype)))
            measured.append(work())
        ratios = [found / expected for found, expected in zip(measured, formulas, strict=True)]
        seconds_of = [f"{statistics.median(each):.3f} s" for each in (formulas, measured)]
        rows.append([name, *seconds_of, spread(ratios)])
    table(["what", "formula", "measured", "measured / formula"], rows)


if __name__ == "__main__":
    main()

"""Training from the cache compared with what people use. `python -m bench.train [PART ...]`, after `make repro`.

1. `public`: positions/s, and memory above weights and optimizer, against the public recipe written plainly (all heads'
   full logits, dense embedding gradients) in float32 and in bf16 autocast: same data, micro-batches, loss and updates.
   On a CPU without instructions for bf16 ours is in float32 and that autocast is left out, as nobody would train in it.
2. `loop`: an epoch from the cache against an epoch with the base in the loop, and what the formulas say for 8B and 70B.
3. `vocabularies`: speed of draft vocabularies of 4k, 8k, 16k and all tokens, and of the two losses.
4. `eagle3`: as 1, against the public recipe for EAGLE-3 (padded batches, all depths' logits over the draft vocabulary),
   with dense attention masks, and with EAGLE's own extra columns; and against vLLM's `speculators`, where that is
   installed (bench/public_speculators.py). After `spec cache -S model.speculator.method=eagle3`.

Each form runs in a process of its own, so that its peak memory is its own, which is read from Linux's /proc.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import torch

from bench import public_eagle3, recipes
from bench.common import METHODS, default_config, load_base, machine, parts_of, reader, spread, table, teacher_of
from spec import base, costs
from spec.config import Config
from spec.device import synchronize
from spec.heads import Speculator
from spec.heads.eagle3 import Eagle3
from spec.store import tables as base_tables
from spec.store.reader import FeatureReader
from spec.training.start import initialise, shape_on
from spec.workers import Worker, this_worker
from stages import common

BATCH, STEPS, WARMUP, ROUNDS = 8, 12, 2, 3
FORMS = ("ours", "public, bf16 autocast", "public, float32")
EAGLE3_FORMS = ("ours", "public, extra columns", "public, dense masks")
SPECULATORS_FORMS = ("speculators", "speculators, lm_head trained")


def main() -> None:
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        print(json.dumps(one(json.loads(sys.argv[1]))))
        return
    parts = {
        "public": beside_the_public_recipe,
        "loop": beside_the_base_in_the_loop,
        "vocabularies": draft_vocabularies,
        "eagle3": eagle3_beside_the_public_recipe,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", choices=[*parts, []], help="default: all")
    asked = parser.parse_args()
    print(machine())
    for name in asked.part or parts:
        parts[name]()


def run(**request: object) -> dict[str, float]:
    """One form in a process of its own."""
    command = [sys.executable, "-m", "bench.train", json.dumps(request)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def beside_the_public_recipe() -> None:
    mixed = this_worker().mixed("bfloat16")
    print(f"\n1. sum_rnn, n=3, width 576, all of the vocabulary, {BATCH} sequences a step, {STEPS} steps")
    compare([form for form in FORMS if mixed or "bf16" not in form], drafted=None, loss="ce")


def eagle3_beside_the_public_recipe() -> None:
    speculator = default_config(*METHODS["eagle3"]).model.speculator
    n, drafted = speculator.n_predict, speculator.draft_vocab_size
    installed = importlib.util.find_spec("speculators")
    print(f"\n4. eagle3, n={n}, {drafted or 'all'} tokens, kl, {BATCH} sequences a step, {STEPS} steps")
    if not installed:
        print("Without `speculators`, which is not installed: bench/public_speculators.py says how.")
    compare(EAGLE3_FORMS + (SPECULATORS_FORMS if installed else ()), method="eagle3", drafted=drafted, loss="kl")


def compare(forms: Sequence[str], **request: object) -> None:
    """Print speed, memory and loss of each form, ours first; rounds turn the order round."""
    found: dict[str, list[dict[str, float]]] = {form: [] for form in forms}
    for turn in range(ROUNDS):
        for form in forms if turn % 2 == 0 else reversed(forms):
            found[form].append(run(form=form, **request))
    ours = found["ours"]
    rows = []
    for form, runs in found.items():
        speed = [a["rate"] / b["rate"] for a, b in zip(ours, runs, strict=True)]
        memory = [a["memory"] / b["memory"] for a, b in zip(ours, runs, strict=True)]
        rate, held = (statistics.median(run[name] for run in runs) for name in ("rate", "memory"))
        shown = [f"{rate:,.0f}", spread(speed), f"{held / 1e6:,.0f}", spread(memory), f"{runs[0]['loss']:.4f}"]
        rows.append([form, *shown])
    table(["form", "positions/s", "ours / it", "MB above static", "ours / it", "loss at the last step"], rows)


def beside_the_base_in_the_loop() -> None:
    config = default_config()
    cached = run(form="ours", drafted=config.model.speculator.draft_vocab_size, loss=config.optim.loss)
    model = load_base(config)
    found = reader(config, "train")
    lengths = [len(sequence.ids) for _, sequence in found.sequences(range(64))]
    began, tokens = time.perf_counter(), 0
    with torch.inference_mode():
        for part in parts_of(lengths, BATCH):
            ids = torch.zeros(len(part), base.bucket(max(part)), dtype=torch.long, device=model.device)
            base.hidden_states(model.model, ids)
            tokens += sum(part)
    synchronize(model.device)
    base_rate = tokens / (time.perf_counter() - began)
    manifest = found.manifest
    from_cache = manifest.positions / cached["rate"]
    in_the_loop = from_cache + manifest.tokens / base_rate
    drafted = config.model.speculator.draft_vocab_size or "all"
    print(f"\n2. An epoch of the default (draft vocabulary {drafted}, {config.optim.loss})")
    shown = [f"{from_cache:,.0f} s", f"{in_the_loop:,.0f} s", f"{in_the_loop / from_cache:.2f}"]
    rows = [["default, here (measured)", *shown]]
    h100 = costs.Machine(400e12, 3e12)
    for name, size, hidden, outputs in (
        ("8B, V=128k, n=3", 8e9, 4096, 128256),
        ("8B, draft vocabulary 32k", 8e9, 4096, 32768),
        ("70B, V=128k, n=3", 70e9, 8192, 128256),
        ("70B, draft vocabulary 32k", 70e9, 8192, 32768),
    ):
        operations = 3 * outputs * hidden + 3 * hidden**2  # of heads as wide as the base: SumRnn.operations
        job = costs.Job(size, hidden, 1e9, 0.6e9, 0, 64, operations)
        a, b = costs.epoch_seconds(job, h100), costs.loop_epoch_seconds(job, h100)
        shown = [f"{a / 3600:,.1f} h", f"{b / 3600:,.1f} h", f"{b / a:.2f}"]
        rows.append([f"{name} (formula: ce, 1 G tokens, an H100)", *shown])
    table(["epoch", "from the cache", "base in the loop", "ratio"], rows)
    print("One epoch in one run costs the same either way; every further epoch, head and run saves the difference.")


def draft_vocabularies() -> None:
    rows = []
    for drafted in (4096, 8192, 16384, None):
        ce, kl = (run(form="ours", drafted=drafted, loss=loss)["rate"] for loss in ("ce", "kl"))
        rows.append([drafted or "all 49,152", f"{ce:,.0f}", f"{kl:,.0f}", f"{ce / kl:.2f}"])
    print("\n3. Draft vocabularies (their acceptance: bench/quality.py)")
    table(["draft_vocab_size", "positions/s, ce", "kl", "seconds of kl / ce"], rows)


def one(request: Mapping[str, object]) -> dict[str, float]:
    """Train a few steps in one form; returns positions/s, bytes above static, and the last loss."""
    form, drafted = str(request["form"]), request["drafted"]
    config = default_config(
        *METHODS[str(request.get("method", "sum_rnn"))],
        f"model.speculator.draft_vocab_size={'null' if drafted is None else drafted}",
        f"model.dtype={'float32' if form == 'public, float32' else 'bfloat16'}",
        f"optim.loss={request['loss']}",
        "optim.lr=0.002",
    )
    worker = this_worker()
    data = reader(config, "train")
    shape = shape_on(config.model.speculator, data.manifest)
    tables = base_tables.Tables(data.tables)
    speculator = initialise(config, shape, data.token_counts(), tables).to(worker.device)
    parts = parts_of(data.order(0, 0), BATCH)[:STEPS]
    recipe = make(form, config, speculator, data, parts, worker, tables)
    found = recipes.measure(recipe, worker.device, STEPS, WARMUP)
    return {"rate": found.rate, "memory": found.memory, "loss": found.losses[-1]}


def make(
    form: str,
    config: Config,
    speculator: Speculator,
    data: FeatureReader,
    parts: Sequence[Sequence[int]],
    worker: Worker,
    tables: Mapping[str, torch.Tensor],
) -> recipes.Recipe:
    """A form, ready for its first step."""
    given, teacher = (data, parts, worker), teacher_of(config, tables)
    if form == "ours":
        return recipes.ours(config, speculator, *given, teacher)
    if isinstance(speculator, Eagle3):
        assert teacher is not None
        if form in SPECULATORS_FORMS:
            from bench import public_speculators  # needs a package that need not be installed

            folder = common.base_folder(config, common.read_sources())
            return public_speculators.recipe(config, speculator, *given, folder, frozen="trained" not in form)
        return public_eagle3.recipe(config, speculator, *given, teacher, dense=form == "public, dense masks")
    return recipes.public(config, speculator, *given)


if __name__ == "__main__":
    main()

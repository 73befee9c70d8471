"""evaluate: acceptance on held-out prompts, on paper and for real, beside plain decoding and n-gram lookup."""

from __future__ import annotations

import csv
import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spec import acceptance, base, corpus, evaluation, files, heads, plots, tracking
from spec.config import Config
from spec.decoding import LanguageModelWithSpeculator
from spec.drafting import NGRAM_LENGTH
from spec.store import features
from spec.store.collection import Collection
from spec.store.features import FeatureRow
from spec.store.manifest import Manifest
from spec.store.reader import FeatureReader
from stages import common
from stages.cache import describe, plan_features

RESULTS = Path("results/evaluate")
LOSSLESS_PROMPTS = 4
LOSSLESS_TOKENS = 32


@common.stage
def evaluate(config: Config) -> None:
    """Measure models/speculator on the eval split, and write results/evaluate."""
    source = common.read_sources()["base"]
    manifest = common.open_manifest(config, "eval")
    shape = heads.read_config(common.MODEL)
    if not config.model.freeze_base_model:
        common.check_joint(manifest, "eval")
        source, manifest = _with_trained_base(config)
    heads.check_base(shape, manifest.vocab_size, manifest.hidden_size, source["weights"])
    run = tracking.Run(config, "evaluate", {"features": manifest.digest}, parent=tracking.kept_run(common.MODEL))
    try:
        with common.using_store(config) as root:
            metrics = _measure(config, source, FeatureReader(manifest, root), shape.n_predict)
        _track(run, metrics)
        run.finish()
    except BaseException:
        run.finish("FAILED")
        raise
    _report(metrics)


def _measure(config: Config, source: Mapping[str, Any], reader: FeatureReader, n: int) -> dict[str, Any]:
    """Walk, decode, compare; writes everything under results/evaluate."""
    dtype = getattr(torch, config.model.dtype)
    device = base.choose_device()
    with common.progress(reader.manifest.positions, "positions", "evaluate: exact walk") as bar:
        measured = evaluation.offline(heads.load(common.MODEL, device, dtype), reader, config.decode, bar.update)
    indices = evaluation.choose_prompts(reader, config.evaluate.max_prompts)
    timed: dict[str, dict[Any, evaluation.Timed]] = {}
    if indices:
        model = _model(config, source, config.model.dtype)
        with common.progress(len(indices), "prompts", "evaluate: decoding") as bar:
            timed = evaluation.decoding(model, reader, indices, config.evaluate.max_new_tokens, bar.update)
        if config.model.dtype != "float32":
            del model
            gc.collect()
            model = _model(config, source, "float32")
        common.say("evaluate: comparing with plain decoding token for token, in float32")
        length = min(LOSSLESS_TOKENS, config.evaluate.max_new_tokens)
        same = evaluation.lossless(model, reader, indices[:LOSSLESS_PROMPTS], length)
    else:
        same = None
    metrics = evaluation.summary(measured, timed, same, config.decode.draft, n)
    files.write_json(RESULTS / "metrics.json", metrics)
    _draw(measured, metrics, n)
    return metrics


def _with_trained_base(config: Config) -> tuple[dict[str, Any], Manifest]:
    """The base that joint training made, and the eval split with its states, which are cached here."""
    source = {"name": str(common.TRAINED_BASE), "revision": None, **base.identify(common.TRAINED_BASE)}
    source["tokenizer"] = common.read_sources()["base"]["tokenizer"]  # it made the ids, and `forget` looks for it
    rows = corpus.read(common.responses_path("eval"))
    identity = features.identity(source, config.model.dtype, config.features.codec)
    collection = Collection(common.store_root(config), "features", identity)
    keyed = list(map(FeatureRow.of, rows))
    with common.using_store(config):
        groups = common.plan_missing(collection, "evaluate", lambda known: plan_features(config, keyed, known))
        model = base.load(config.model, common.TRAINED_BASE, source["weights"])
        features.save_tables(model, collection)
        total = sum(len(keyed[number].ids) for group in groups for number in group)
        with common.progress(total, "tokens", "evaluate: states of the trained base") as bar:
            features.produce(model, collection, keyed, groups, config.features.codec, bar.update)
    manifest = describe(config, collection, rows, [row.key for row in keyed], source)
    return source, manifest


def _model(config: Config, source: Mapping[str, Any], dtype: str) -> LanguageModelWithSpeculator:
    folder = base.resolve(source["name"], source["revision"])
    model = base.load(config.model, folder, source["weights"], dtype=dtype)
    return LanguageModelWithSpeculator(
        model, heads.load(common.MODEL, model.device, getattr(torch, dtype)), config.decode
    )


def _draw(measured: evaluation.Offline, metrics: Mapping[str, Any], n: int) -> None:
    """Tables for dvc, and pictures."""
    shares = {
        source: acceptance.acceptance(walks, n if source == "head" else NGRAM_LENGTH)
        for source, walks in measured.walks.items()
    }
    with (RESULTS / "acceptance.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["position", "source", "acceptance"])
        writer.writerows([i, source, share] for source, row in shares.items() for i, share in enumerate(row, 1))
    lines: dict[str, Any] = {source: (list(range(1, len(row) + 1)), row) for source, row in shares.items()}
    plots.curves(RESULTS / "acceptance.png", lines, "drafted position", "share of steps that accept it")
    bars = {
        name: {
            "head": row["tokens_per_step"],
            "n-gram": row["ngram_tokens_per_step"],
            "hybrid": row["hybrid_tokens_per_step"],
        }
        for name, row in metrics["domains"].items()
    }
    with (RESULTS / "domains.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["domain", "source", "tokens_per_step"])
        writer.writerows([name, source, value] for name, row in bars.items() for source, value in row.items())
    plots.bars(RESULTS / "domains.png", bars, "tokens per step", baseline=1.0)


def _track(run: tracking.Run, metrics: Mapping[str, Any]) -> None:
    """Record in a child of the run that trained the heads; the headline figures stand on the parent too."""
    flat = _flat(metrics)
    run.log(flat)
    headline = ("offline.tokens_per_step", "ngram.tokens_per_step", "decode.tokens_per_step", "decode.speedup")
    run.log({name: flat[name] for name in headline if name in flat}, to_parent=True)
    run.artifacts(RESULTS, "evaluate")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers by their dotted names."""
    flat: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            flat[f"{prefix}{name}"] = float(value)
    return flat


def _report(metrics: Mapping[str, Any]) -> None:
    """The table that a run ends with."""
    decode, offline = metrics["decode"], metrics["offline"]
    common.say("")
    common.say(f"{'':12}  tokens per step (exact walk)          wall clock")
    common.say(
        f"{'domain':12}  {'head':>6}  {'n-gram':>6}  {'hybrid':>6}  {'looping':>7}    x plain ({decode['draft']})"
    )
    rows = {
        **metrics["domains"],
        "all": {
            "tokens_per_step": offline["tokens_per_step"],
            "ngram_tokens_per_step": metrics["ngram"]["tokens_per_step"],
            "hybrid_tokens_per_step": metrics["hybrid"]["tokens_per_step"],
            "repetition": metrics["repetition"],
            "speedup": decode["speedup"],
        },
    }
    for name, row in rows.items():
        speedup = row.get("speedup")
        common.say(
            f"{name:12}  {row['tokens_per_step']:6.2f}  {row['ngram_tokens_per_step']:6.2f}  "
            f"{row['hybrid_tokens_per_step']:6.2f}  {row['repetition']:7.0%}    "
            + (f"{speedup:.2f}" if speedup else "-")
        )
    low, high = offline["tokens_per_step_low"], offline["tokens_per_step_high"]
    common.say(f"head: 95 % interval {low:.2f} to {high:.2f} over {offline['answers']} answers")
    if offline["written_by_base"] < 1:
        share = 1 - offline["written_by_base"]
        common.say(f"note: {share:.0%} of the answers were not written greedily by the base; decoding will differ")
    if offline["tokens_per_step"] <= metrics["ngram"]["tokens_per_step"]:
        common.say("note: n-gram lookup alone, which needs no training, does as well as this head or better")
    if decode["lossless"] is not None:
        common.say(f"identical to plain greedy decoding in float32: {'yes' if decode['lossless'] else 'NO'}")
    common.say(f"evaluate: {decode['prompts']} prompts decoded, {offline['answers']} answers walked -> {RESULTS}")


if __name__ == "__main__":
    evaluate()

"""evaluate: acceptance on held-out prompts, offline and in real decoding, next to plain decoding and n-gram lookup."""

from __future__ import annotations

import csv
import gc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from spec import acceptance, base, corpus, evaluation, files, heads, plots, record, tracking
from spec.config import Config
from spec.decoding import LanguageModelWithSpeculator
from spec.device import arithmetic, choose_device
from spec.drafting import Source, every_source, open_lookup
from spec.store import features, index, locks, tables
from spec.store.features import FeatureRow
from spec.store.manifest import Manifest, make_manifest
from spec.store.reader import FeatureReader
from stages import common

RESULTS = common.EVALUATE_RESULTS
_DRAWN_TABLES = ("acceptance", "domains", "draft_length")
_WRITTEN = ("metrics.json", common.DETAILS, *(f"{name}.{kind}" for name in _DRAWN_TABLES for kind in ("csv", "png")))
"""The files that this stage writes into results/evaluate; others there are left alone."""
_TOKENS_PER_STEP = {"head": "offline", "ngram": "ngram", "lookup": "lookup", "hybrid": "hybrid"}
"""Names in metrics.json, and the sections of details.json that they are taken from."""
_BARS = {
    "head": "tokens_per_step",
    "n-gram": "ngram_tokens_per_step",
    "lookup": "lookup_tokens_per_step",
    "hybrid": "hybrid_tokens_per_step",
}
"""Names in domains.csv and its picture, and the figures of a domain that they are; no lookup without an index."""
_DRAWN = 8
"""Positions of an n-gram's draft that acceptance.csv and its picture show."""
_Timed = dict[Source, list[evaluation.Timed]]
_LOSSLESS_PROMPTS, _LOSSLESS_TOKENS = 4, 32
HEADLINE = [*_TOKENS_PER_STEP, "x_plain", "lossless"]
"""The figures of metrics.json, which stand on the MLflow run that trained the heads, too."""


@common.stage
def evaluate(config: Config) -> None:
    """Measure models/speculator on the eval split, and write results/evaluate."""
    source = common.read_sources()["base"]
    manifest = common.open_manifest(config, "eval")
    shape = heads.read_config(common.MODEL)
    if not config.model.freeze_base_model:
        common.check_joint(manifest, "eval")
        source, manifest = _with_trained_base(config, manifest.layers)
    manifest = manifest.reading(shape.taps(shape.layers))
    heads.check_base(shape, manifest.vocab_size, manifest.hidden_size, source["weights"])
    sources = {**common.read_sources(), "base": source}
    tags = {"features": manifest.digest, "method": shape.method}
    run = tracking.Run(config, "evaluate", tags, sources, ("eval",), choose_device(), record.kept(common.MODEL))
    try:
        root = common.store_root(config)
        with locks.in_use(root):
            reader = FeatureReader(manifest, root)
            reader.check()
            metrics, shown = _measure(config, source, reader, shape.n_predict)
        lines = _report(metrics, shown)
        steps = ", ".join(f"{name} {found:.2f}" for name, found in _tokens_per_step(metrics).items())
        run.finish(
            RESULTS,
            metrics=_tracked(metrics),
            headline=HEADLINE,
            artifacts={str(RESULTS / name): "evaluate" for name in _WRITTEN if (RESULTS / name).is_file()},
            description="\n".join([f"**Tokens per step: {steps}**", "```", *lines, "```"]),
        )
    except BaseException:
        run.finish(RESULTS, "FAILED")
        raise
    for line in ("", *lines):
        common.say(line)
    decoded, answers = metrics["decode"]["prompts"], metrics["offline"]["answers"]
    common.say(f"evaluate: {decoded} prompts decoded, {answers} answers walked -> {RESULTS}")


def _measure(
    config: Config, source: Mapping[str, Any], reader: FeatureReader, n: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Walk, decode, compare, and write results/evaluate: the metrics, and those of the domains that a table shows."""
    device = choose_device()
    dtype = arithmetic(config.model.dtype, device)
    found = tables.Tables(reader.tables)
    teacher = found.teacher()
    if teacher is not None:
        teacher = teacher.over(None, device, dtype)
    speculator = heads.load(common.MODEL, device, dtype, found)
    every = every_source(config.decode, speculator.config, open_lookup(common.MODEL, speculator.config))
    passes = len(every) + (teacher is not None)
    with common.progress(passes * reader.manifest.positions, "positions", "evaluate: exact walk") as bar:
        measured = evaluation.offline(speculator, reader, every, teacher, bar.update)
    indices = evaluation.choose_prompts(reader, config.evaluate.max_prompts)
    paper = evaluation.on_paper(measured, reader, indices, config.evaluate.max_new_tokens)
    nothing: _Timed = {source: [] for source in ("none", *measured.walks)}
    timed, same = _decode(config, source, reader, indices) if indices else (nothing, None)
    metrics = evaluation.summary(measured, timed, paper, same, config.decode.draft)
    trusted = config.model.trust_remote_code
    stops = base.stop_ids(base.resolve(source["name"], source["revision"], trusted), trusted)
    metrics["cut"] = evaluation.cut(measured.answers["head"], reader, stops)
    metrics["speculator"] = files.digest_file(common.MODEL / heads.WEIGHTS)  # whose figures these are
    files.write_json(RESULTS / common.DETAILS, metrics)
    files.write_json(RESULTS / "metrics.json", _decisive(metrics))
    shown = evaluation.by_domain(measured, timed, paper, config.decode.draft, evaluation.largest(measured))
    _draw(measured, metrics["domains"], shown, n)
    return metrics, shown


def _tokens_per_step(metrics: Mapping[str, Any]) -> dict[str, float]:
    """By source, those of the walk over all of eval."""
    return {name: metrics[key]["tokens_per_step"] for name, key in _TOKENS_PER_STEP.items() if key in metrics}


def _decode(
    config: Config, source: Mapping[str, Any], reader: FeatureReader, indices: list[int]
) -> tuple[_Timed, bool | None]:
    """Prompts decoded for real, and whether no draft changes a token in float32; None where drafts cannot be taken
    back."""
    limit, model = config.evaluate.max_new_tokens, _model(config, source, config.model.dtype)
    with common.progress(len(indices), "prompts", "evaluate: decoding") as bar:
        timed = evaluation.decoding(model, reader, indices, limit, bar.update)
    if not model.base.limits.takes_back:
        common.say("evaluate: the base cannot take drafts back; only plain decoding was measured")
        return timed, None
    if model.base.model.dtype != torch.float32:
        del model
        gc.collect()
        model = _model(config, source, "float32")
    common.say("evaluate: comparing with plain decoding token for token, in float32")
    return timed, evaluation.lossless(model, reader, indices[:_LOSSLESS_PROMPTS], min(_LOSSLESS_TOKENS, limit))


def _decisive(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that a person decides by, as dvc shows them; None where drafts could not be taken back."""
    steps = {name: round(found, 3) for name, found in _tokens_per_step(metrics).items()}
    speedup = metrics["decode"].get("speedup")
    speedup = None if speedup is None else round(speedup, 2)
    return {**steps, "x_plain": speedup, "lossless": metrics["decode"]["lossless"]}


def _tracked(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures that MLflow shows; details.json, which it has as a file, holds all of them."""
    offline, decode = metrics["offline"], metrics["decode"]
    found = {
        **_decisive(metrics),
        "head_low": offline["tokens_per_step_low"],
        "head_high": offline["tokens_per_step_high"],
        "walk": decode.get("walk_tokens_per_step"),
        "loop": decode.get("tokens_per_step"),
        "looping": metrics["repetition"],
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def _with_trained_base(config: Config, layers: int) -> tuple[dict[str, Any], Manifest]:
    """The base that joint training made, and the eval split with its states, which are cached here."""
    trusted = config.model.trust_remote_code
    source = {"name": str(common.TRAINED_BASE), "revision": None, **base.identify(common.TRAINED_BASE, trusted)}
    source["tokenizer"] = common.read_sources()["base"]["tokenizer"]  # it made the ids, and `forget` looks for it
    rows = corpus.read(common.responses_path("eval"))
    root = common.store_root(config)
    stores = features.tap_stores(root, source, config, common.arithmetic_here(config), layers)
    kept = tables.collection(root, source, config.model.dtype)
    keyed = list(map(FeatureRow.of, rows))
    with locks.in_use(root):
        index.write(root, rows)
        known = [common.known_rows(store.collection, "evaluate") for store in stores]
        common.known_rows(kept, "evaluate")
        groups = features.plan(keyed, known, config.features.segment_tokens)
        model = base.load(config.model, common.TRAINED_BASE, source["weights"])
        total = sum(len(keyed[number].ids) for numbers, _ in groups for number in numbers)
        with common.progress(total, "tokens", "evaluate: states of the trained base") as bar:
            tables.save(model, kept, [row.ids for row in rows])
            features.produce(model, stores, keyed, groups, bar.update)
    keys, collections = [row.key for row in keyed], [store.collection for store in stores]
    return source, make_manifest(collections, keys, rows, base=source, **tables.shape(kept), greedy=False)


def _model(config: Config, source: Mapping[str, Any], dtype: str) -> LanguageModelWithSpeculator:
    folder = base.resolve(source["name"], source["revision"], config.model.trust_remote_code)
    model = base.load(config.model, folder, source["weights"], dtype=dtype)
    speculator = heads.load(common.MODEL, model.device, model.model.dtype, model.tables)
    return LanguageModelWithSpeculator(model, speculator, config.decode, open_lookup(common.MODEL, speculator.config))


def _draw(measured: evaluation.Offline, domains: Mapping[str, Any], shown: Mapping[str, Any], n: int) -> None:
    """Tables for dvc, and pictures."""
    cuts = {source: n if source == "head" else _DRAWN for source in measured.walks}
    shares = {source: acceptance.acceptance(walks, cuts[source]) for source, walks in measured.walks.items()}
    _curves("acceptance", ("position", "acceptance"), shares, "drafted position", "share of steps that accept it")
    columns, axes = ("draft_len", "tokens_per_step"), ("drafted tokens a step, at most", "tokens per step (exact walk)")
    _curves("draft_length", columns, measured.by_length, *axes)
    bars = {source: figure for source, figure in _BARS.items() if all(figure in row for row in domains.values())}
    rows = ((name, source, row[figure]) for name, row in domains.items() for source, figure in bars.items())
    _write_table("domains", ("domain", "tokens_per_step"), rows)
    groups = {name: {source: row[figure] for source, figure in bars.items()} for name, row in shown.items()}
    plots.bars(RESULTS / "domains.png", groups, "tokens per step", baseline=1.0)


def _curves(name: str, columns: tuple[str, str], rows: Mapping[Any, Sequence[float]], x: str, y: str) -> None:
    """Write a table and a picture of values by source, one for each of 1, 2, ..."""
    _write_table(name, columns, ((i, source, value) for source, row in rows.items() for i, value in enumerate(row, 1)))
    plots.curves(RESULTS / f"{name}.png", {key: (range(1, len(row) + 1), row) for key, row in rows.items()}, x, y)


def _write_table(name: str, columns: tuple[str, str], rows: Iterable[tuple[Any, str, float]]) -> None:
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([columns[0], "source", columns[1]])
        writer.writerows(rows)


def _report(metrics: Mapping[str, Any], shown: Mapping[str, Any]) -> list[str]:
    """The table that a run ends with, and what it means, line by line."""
    decode, offline = metrics["decode"], metrics["offline"]
    total = {
        **{f"{name}_tokens_per_step": found for name, found in _tokens_per_step(metrics).items()},
        "tokens_per_step": offline["tokens_per_step"],
        "drafted_per_step": metrics["hybrid"]["drafted_per_step"],
        "repetition": metrics["repetition"],
        **decode["sources"].get(decode["draft"], {}),
    }
    lines = _table({**shown, "all": total}, f"{decode['prompts']} prompts, {decode['draft']}")
    low, high = offline["tokens_per_step_low"], offline["tokens_per_step_high"]
    lines.append(f"head: 95 % interval {low:.2f} to {high:.2f} over {offline['answers']} answers")
    if "sampling" in offline:
        rates = ", ".join(f"{row['tokens_per_step']:.2f} at {t}" for t, row in offline["sampling"].items())
        lines.append(f"head, sampled at a temperature, expected: {rates}")
    if offline["written_by_base"] < 1:
        share = 1 - offline["written_by_base"]
        lines.append(f"note: {share:.0%} of the answers were not written greedily by the base; decoding will differ")
    if metrics["cut"]:
        cut = f"{metrics['cut']:.0%} of the answers end without a stop token"
        lines.append(f"note: {cut}: they were cut at their longest")
    if metrics["repetition"]:
        lines.append(f"note: {metrics['repetition']:.0%} of the answers end in a loop")
    free, gain = "lookup" if "lookup" in metrics else "n-gram lookup", metrics["gain"]
    lines.append(
        f"what the head adds to {free}, which needs no training: {gain['value']:.2f} tokens per step (95 % interval "
        f"{gain['low']:.2f} to {gain['high']:.2f})"
    )
    useless = [plots.short(name) for name, row in {**shown, "all": metrics}.items() if row["gain"]["low"] <= 0]
    if useless:
        lines.append(
            f"warning: it is not certain that the head adds anything in {', '.join(useless)}: more data or a longer "
            "training may help (docs/metrics.md)"
        )
    if decode["lossless"] is not None:
        lines.append(f"identical to plain greedy decoding in float32: {'yes' if decode['lossless'] else 'NO'}")
    return lines


def _table(rows: Mapping[str, Mapping[str, Any]], decoded: str) -> list[str]:
    """The aligned lines of the table, one for each domain; `decoded` is the heading of what was decoded for real."""
    width = max(12, *(len(plots.short(name)) for name in rows))
    lines = [f"{'':{width}}  {'tokens per step, all of eval':39}  {decoded}"]
    titles = "  ".join(f"{name:>6}" for name in (*_BARS, "drafted", "walk", "loop", "x plain"))
    lines.append(f"{'domain':{width}}  {titles}")
    for name, row in rows.items():
        found = (f"{row[figure]:6.2f}" if figure in row else "     -" for figure in _BARS.values())
        line = "  ".join([f"{plots.short(name):{width}}", *found, f"{row['drafted_per_step']:7.2f}"])
        if row.get("speedup"):
            line += f"  {row['walk_tokens_per_step']:6.2f}  {row['decode_tokens_per_step']:6.2f}  {row['speedup']:7.2f}"
        lines.append(line)
    return lines


if __name__ == "__main__":
    evaluate()

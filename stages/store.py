"""store: look after the store: info, verify, gc, forget."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from spec import base, corpus, files
from spec.config import Config
from spec.errors import SpecError
from spec.store import segment, upkeep
from spec.store.manifest import Manifest
from spec.store.remote import DAY, Mirror
from stages import common


@click.group()
def store() -> None:
    """Look after the store of answers and hidden states (features.store)."""


@common.stage_of(store)
@click.argument("manifest", required=False, type=click.Path(path_type=Path))
def info(config: Config, manifest: Path | None) -> None:
    """Describe the store, or one manifest (data/features/SPLIT.json)."""
    root, mirror = common.store_root(config), common.mirror(config)
    if manifest is not None:
        _describe(root, mirror, Manifest.load(manifest), manifest)
        return
    found = list(upkeep.summaries(root))
    for summary in found:
        common.say(
            f"{summary.folder.name}: {summary.segments} segments, {summary.rows:,} rows, {common.size(summary.bytes)}"
        )
        common.say("".join(f"    {key}: {value}\n" for key, value in summary.identity.items()).rstrip("\n"))
        for producer in filter(None, summary.producers):
            common.say(f"    computed by: {producer}")
        for name in summary.damaged:
            common.say(f"    DAMAGED: {name}")
    total = common.size(sum(summary.bytes for summary in found))
    common.say(f"store {root}: {len(found)} collections, {total}, {common.size(files.free_bytes(root))} free")
    for there in mirror.summaries() if mirror else ():
        common.say(
            f"{config.features.store}/{there.name}: {there.segments} segments, {common.size(there.bytes)}; "
            f"{there.cached} of them are here"
        )


def _describe(root: Path, mirror: Mirror | None, manifest: Manifest, path: Path) -> None:
    collection = manifest.collection(root)
    missing = []
    for name, digest in zip(manifest.segments, manifest.digests, strict=True):
        try:
            if collection.record(name).digest != digest:
                missing.append(name)
        except segment.DamagedError:
            missing.append(name)
    where = str(collection.folder)
    if mirror:
        missing, where = mirror.missing(collection, missing), mirror.url
    counts = np.bincount(np.asarray(manifest.domain, np.int64), minlength=len(manifest.domains))
    domains = ", ".join(f"{name} {count}" for name, count in zip(manifest.domains, counts, strict=True))
    share = manifest.positions / max(manifest.tokens, 1)
    common.say(
        f"{path}: {len(manifest)} sequences ({domains}), {manifest.positions:,} positions "
        f"({share:.0%} of {manifest.tokens:,} tokens)\n"
        f"    base: {manifest.base['name']} ({manifest.base['weights'][:16]}), {manifest.dtype}, "
        f"d={manifest.hidden_size}, V={manifest.vocab_size}\n"
        f"    digest: {manifest.digest}\n"
        f"    in {where}: {len(manifest.segments)} segments, {len(missing)} missing or damaged"
    )
    for name in missing:
        common.say(f"    MISSING: {name}")


@common.stage_of(store)
@click.option("--dry-run", is_flag=True, help="Name damaged segments, and leave them where they are.")
def verify(config: Config, dry_run: bool) -> None:
    """Read everything, check it, and set damaged segments aside, so that respond and cache compute them again."""
    root, mirror = common.store_root(config), common.mirror(config)
    total = sum(summary.bytes for summary in upkeep.summaries(root))
    with common.progress(total, "B", "verify") as bar:
        whole, problems = upkeep.verify(root, not dry_run, bar.update)
    if mirror:
        more, others = mirror.verify(not dry_run)
        common.say(f"store {mirror.url}: {more} segments are whole, {len(others)} are not")
        whole, problems = whole + more, problems + others
    for problem in problems:
        common.say(str(problem))
    if problems:
        what = (
            "Nothing was moved"
            if dry_run
            else "Damaged segments are set aside: `spec respond` and `spec cache` mend them"
        )
        raise SpecError(
            f"store {root}: {whole} segments are whole; what is not, {len(problems)} in all, is named above. {what}"
        )
    common.say(f"store {root}: all {whole} segments are whole ({common.size(total)} read)")


@common.stage_of(store)
@click.option("--older-than", type=click.FloatRange(min=0), default=7, show_default=True, metavar="DAYS")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
def gc(config: Config, older_than: float, dry_run: bool) -> None:
    """Remove segments that no manifest names.

    A manifest counts while its workspace holds it, or for DAYS after a stage last used it (experiments and other
    branches); segments that no manifest names stay for DAYS too, since an interrupted run may come back for them.
    """
    root, mirror = common.store_root(config), common.mirror(config)
    done = "would be removed" if dry_run else "removed"
    if mirror:
        removal, there = mirror.gc(older_than * DAY, not dry_run)
        size = common.size(there.bytes)
        common.say(f"store {mirror.url}: {there.segments} segments ({size}) {done}, {there.kept} kept")
    else:
        removal = upkeep.gc(root, older_than * DAY, not dry_run)
    common.say(
        f"store {root}: {removal.segments} segments ({removal.rows:,} rows, {common.size(removal.bytes)}) {done}, "
        f"{removal.kept} kept"
    )


@common.stage_of(store)
@click.argument("rows", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--yes", is_flag=True, help="Do not ask.")
def forget(config: Config, rows: tuple[Path, ...], yes: bool) -> None:
    """Remove every trace of given rows: states, ids, answers and keys.

    ROWS are parquet files in the layout of your data; whatever begins with one of their prompts goes.
    """
    sources = common.read_sources()
    folder = base.resolve(config.model.partial_pretrain, sources["base"]["revision"])
    tokenizer = base.load_tokenizer(folder, config.model.trust_remote_code)
    found = list(
        corpus.stream(
            corpus.list_files([str(path) for path in rows]),
            tokenizer,
            prompt_key=config.data.prompt_key,
            response_key=config.data.response_key,
            max_length=2**31 - 1,
            max_samples=None,
            need_answers=False,
            report=corpus.Report(),
        )
    )
    mirror = common.mirror(config)
    where = f"{mirror.url} and {mirror.root}" if mirror else str(common.store_root(config))
    if not yes:
        click.confirm(f"Remove every stored trace of {len(found)} rows from {where}?", abort=True)
    tokenizer_digest = sources["base"]["tokenizer"]
    prompts = [row.ids[: row.prompt_length] for row in found if row.prompt_length]
    texts = [row.ids for row in found if not row.prompt_length]
    if mirror:
        removal = mirror.forget(tokenizer_digest, prompts, texts)
    else:
        removal = upkeep.forget(common.store_root(config), tokenizer_digest, prompts, texts)
    common.say(
        f"store {where}: {removal.rows} stored rows of {len(found)} given ones are gone; "
        f"{removal.segments} segments were rewritten or removed"
    )
    if mirror:
        common.say(
            "Other machines drop their copies of these segments when they next use the store; one whose last uploads "
            "failed must run this command, too. Replicas and backups of the bucket are out of its reach."
        )
    common.say(
        "Still to be done by you: remove the rows from your data files, run `dvc repro` (nothing is computed again), "
        "then `dvc gc --workspace` and `rm -r` of data/tokens and data/responses in other workspaces. Collections of "
        "other tokenizers were not looked at: run this with their base in model.partial_pretrain."
    )

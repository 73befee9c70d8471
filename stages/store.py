"""store: look after the store: info, verify, gc, forget; copy it with push and pull."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Container
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from spec import base, corpus, files, lookup
from spec.config import Config
from spec.errors import SpecError
from spec.heads import checkpoint
from spec.store import index, locks, upkeep
from spec.store.manifest import Manifest
from spec.store.transfer import Place, Transfer
from stages import common


@click.group()
def store() -> None:
    """Look after the store of answers and hidden states (features.store)."""


@common.stage
@click.argument("manifest", required=False, type=click.Path(path_type=Path))
def info(config: Config, manifest: Path | None) -> None:
    """Describe the store, or one manifest (data/features/SPLIT.json)."""
    root = common.store_root(config)
    if manifest is not None:
        _describe(root, Manifest.load(manifest), manifest)
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


def _describe(root: Path, manifest: Manifest, path: Path) -> None:
    domains = ", ".join(f"{name} {manifest.domain.count(number)}" for number, name in enumerate(manifest.domains))
    share = manifest.positions / max(manifest.tokens, 1)
    common.say(
        f"{path}: {len(manifest)} sequences ({domains}), {manifest.positions:,} positions "
        f"({share:.0%} of {manifest.tokens:,} tokens)\n"
        f"    base: {manifest.base['name']} ({manifest.base['weights'][:16]}), {manifest.dtype}, "
        f"d={manifest.hidden_size}, V={manifest.vocab_size}\n"
        f"    digest: {manifest.digest}"
    )
    for places in manifest.taps:
        collection = places.collection(root)
        found, named = collection.records(), zip(places.segments, places.digests, strict=True)
        missing = [name for name, digest in named if name not in found or found[name].digest != digest]
        tap = f"layer {places.identity['layer']} at {places.tap.positions}"
        held = f"{len(places.segments)} segments, {len(missing)} missing or damaged"
        common.say(f"    {tap}, in {collection.folder}: {held}")
        for name in missing:
            common.say(f"    MISSING: {name}")


@common.stage
@click.option("--dry-run", is_flag=True, help="Name damaged segments, and leave them where they are.")
def verify(config: Config, dry_run: bool) -> None:
    """Read everything, check it, and set damaged segments aside, so that respond and cache compute them again."""
    root = common.store_root(config)
    total = sum(summary.bytes for summary in upkeep.summaries(root))
    with common.progress(total, "B", "verify") as bar:
        whole, problems = upkeep.verify(root, not dry_run, bar.update)
    for problem in problems:
        common.say(str(problem))
    if problems:
        moved = "Nothing was moved" if dry_run else "Damaged segments are set aside"
        raise SpecError(
            f"store {root}: {whole} segments are whole; {len(problems)} problems are named above. {moved}. `spec "
            "respond` and `spec cache` compute again what is missing, `spec store gc` removes what no manifest names"
        )
    common.say(f"store {root}: all {whole} segments are whole ({common.size(total)} read)")


@common.stage
@click.option("--older-than", type=click.FloatRange(min=0), default=7, show_default=True, metavar="DAYS")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
def gc(config: Config, older_than: float, dry_run: bool) -> None:
    """Remove segments that no manifest names.

    A manifest counts while its workspace holds it, or for DAYS after a stage last used it (experiments and other
    branches); segments that no manifest names stay for DAYS too, since an interrupted run may come back for them.
    """
    root = common.store_root(config)
    done = "would be removed" if dry_run else "removed"
    removal = upkeep.gc(root, older_than * 86400, not dry_run)
    common.say(
        f"store {root}: {removal.segments} segments ({removal.rows:,} rows, {common.size(removal.bytes)}) {done}, "
        f"{removal.kept} kept"
    )


@common.stage
@click.argument("rows", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.confirmation_option(prompt="Remove every stored trace of these rows?", help="Do not ask.")
def forget(config: Config, rows: tuple[Path, ...]) -> None:
    """Remove every trace of given rows: states, ids, answers and keys.

    ROWS are parquet files in the layout of your data. Everything that begins with one of their prompts is removed.
    """
    sources = common.read_sources()
    given, unreadable = _given_rows(config, rows, sources)
    root = common.store_root(config)
    removal = upkeep.forget(root, sources["base"]["tokenizer"], given)
    common.say(
        f"store {root}: {removal.rows} stored rows of {len(given)} given ones are gone; "
        f"{removal.segments} segments were rewritten or removed. {removal.indexed} of the given rows are in the "
        "store's index; all were also looked up by the tokens that the template gives now"
    )
    _name_holders(removal.answers | _answers_here(given))
    if removal.missed:
        raise SpecError(
            f"{removal.missed} of the {len(given)} given rows were not found in {root}: they are gone already, or a "
            "version without an index stored them with other tokens. Such rows are found only by the tokens that the "
            "chat template of model.partial_pretrain gives now, with data.date; run this again with the base, template "
            f"and date of that time{unreadable}"
        )
    common.say(
        "You still have to remove the rows from your data files, run `dvc repro` (nothing is computed again), "
        "then run `dvc gc --workspace` and `rm -r` on data/tokens and data/responses in other workspaces. Collections "
        "of other tokenizers were not looked at: run this with their base in model.partial_pretrain. Copies that "
        "`spec store push` made still hold the rows, and a pull brings them back: remove such a copy and push again."
    )


def _answers_here(given: Container[bytes]) -> set[tuple[int, ...]]:
    """What this project was trained on of given rows, which an earlier forget may have removed from the store."""
    path = common.responses_path("train")
    rows = [row for row in corpus.read(path) if row.source in given] if path.exists() else []
    return {answer for row in rows for answer in lookup.answers(row.ids, row.mask)}


def _name_holders(answers: Container[tuple[int, ...]]) -> None:
    """Name the project's checkpoints whose index holds one of these answers, or cannot be read."""
    for path in sorted(common.MODEL.rglob(lookup.FILE)):
        try:
            digest = files.read_json(path.parent / checkpoint.CONFIG).get("lookup")
            if lookup.Lookup.open(path, digest).holds(answers):
                common.say(f"{path} holds answers to these rows: remove them from your data and train again")
        except (OSError, ValueError, AttributeError) as error:
            common.say(f"{path} may hold answers to these rows: {error}")


def _given_rows(
    config: Config, paths: tuple[Path, ...], sources: dict[str, Any]
) -> tuple[dict[bytes, index.Start | None], str]:
    """The rows of some files as forget wants them, and what keeps them from being rendered, if anything does."""
    found = corpus.list_files([str(path) for path in paths])
    columns = {**config.reading, "need_answers": False}
    given: dict[bytes, index.Start | None] = {}
    for source in corpus.inspect(found, **columns):
        for row in corpus.read_rows(source, need_answers=False):
            if not isinstance(row, corpus.Row):
                raise SpecError(f"{row.where}: {row.reason}. Nothing was removed: repair this row or leave it out")
            given[row.digest] = None
    folder = common.base_folder(config, sources)
    limits: dict[str, Any] = {"max_length": 2**31 - 1, "max_samples": None, "skip_bad_rows": True}
    try:
        tokenizer = base.load_tokenizer(folder, config.model.trust_remote_code)
        options = {**columns, **limits, "date": config.data.date, "report": corpus.Report()}
        for sequence in corpus.stream(found, tokenizer, **options):
            given[sequence.source] = index.Start.of(sequence)
    except SpecError as error:
        return given, f". Not all could be rendered: {error}"
    return given, ""


_what = "Copy only what this manifest needs (data/features/SPLIT.json); may be given several times."
_manifests = click.option("--manifest", "manifests", multiple=True, type=click.Path(path_type=Path), help=_what)
_dry_run = click.option("--dry-run", is_flag=True, help="Say what would be copied and how large it is; copy nothing.")


@common.stage
@click.argument("url")
@_manifests
@click.option("--follow", is_flag=True, help="Also copy what is added from now on, until SIGTERM or Ctrl-C.")
@_dry_run
def push(config: Config, url: str, manifests: tuple[Path, ...], follow: bool, dry_run: bool) -> None:
    """Copy to URL the segments that are not there yet.

    URL is a folder or anything that fsspec knows, such as s3://BUCKET/PREFIX. If the command is interrupted, the same
    command completes the copy. With --follow it may run next to a stage.
    """
    if follow and (manifests or dry_run):
        raise click.UsageError("--follow copies everything; leave out --manifest and --dry-run")
    root = common.store_root(config)
    transfer = Transfer(Place(root), Place(url), _named(root, manifests))
    _copy(root, transfer, "push", follow, dry_run)


@common.stage
@click.argument("url")
@_manifests
@_dry_run
def pull(config: Config, url: str, manifests: tuple[Path, ...], dry_run: bool) -> None:
    """Copy from URL the segments that the store lacks; each is verified before it is visible.

    URL is a folder or anything that fsspec knows, such as s3://BUCKET/PREFIX. If the command is interrupted, the same
    command completes the copy.
    """
    root, source = common.store_root(config), Place(url)
    if not source.collections():
        raise SpecError(f"{url} holds no store: there is no folder such as states-0123456789abcdef; check the address")
    _copy(root, Transfer(source, Place(root), _named(root, manifests)), "pull", False, dry_run)


def _named(root: Path, manifests: tuple[Path, ...]) -> dict[str, set[str]] | None:
    """The segments that manifests need, by their collection's folder; None: everything."""
    found: dict[str, set[str]] = {}
    for path in manifests:
        for folder, names in {**upkeep.root_segments(root, path), **Manifest.load(path).needed(root)}.items():
            found.setdefault(folder, set()).update(names)
    return found if manifests else None


def _copy(root: Path, transfer: Transfer, name: str, follow: bool, dry_run: bool) -> None:
    """Say what is to be copied, copy it, and end in an error where something could not be copied."""
    target, lacking = transfer.target, transfer.look()
    total = sum(item.size for item in lacking)
    for folder in sorted({item.collection.folder.name for item in lacking}):
        sizes = [item.size for item in lacking if item.collection.folder.name == folder]
        common.say(f"{name}: {folder}: {len(sizes)} segments ({common.size(sum(sizes))})")
    would = "would be" if dry_run else "are to be"
    size = common.size(total)
    common.say(f"{name}: {len(lacking)} segments ({size}) {would} copied to {target.url}, {transfer.found} are there")
    if not dry_run:
        with contextlib.ExitStack() as stack:
            for used in {root, target.folder or root}:
                stack.enter_context(locks.in_use(used))
            if target.folder:
                common.need_space(target.folder, total, name, "name a folder on a larger disk")
            bar = stack.enter_context(common.progress(total, "B", name))
            if follow:
                _follow(transfer, bar)
            else:
                transfer.copy(lacking, bar.update)
        common.say(f"{name}: {transfer.copied} segments are copied -> {target.url}")
    for problem in transfer.problems:
        common.say(str(problem))
    if transfer.problems:
        left = "everything else would be copied" if dry_run else "everything else is copied"
        raise SpecError(
            f"{name}: {len(transfer.problems)} problems are named above; {left}. `spec store verify` sets damaged "
            "segments of your own store aside; elsewhere remove them by hand, and push them again from a store that "
            "has them"
        )


def _follow(transfer: Transfer, bar: tqdm[Any]) -> None:
    """Copy also what is added, until SIGTERM or SIGINT; a second one ends it at once."""
    stopping = threading.Event()

    def stop(_: int) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    def extend(left: int) -> None:
        bar.total = bar.n + left
        bar.refresh()

    with common.on_signals(stop, signal.SIGTERM, signal.SIGINT):
        transfer.follow(stopping, extend, bar.update)


for part in (info, verify, gc, forget, push, pull):
    store.add_command(part)

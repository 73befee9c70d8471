"""What every stage's command shares: options, errors, progress, workers."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML
from tqdm import tqdm

from spec import base, corpus, files
from spec import config as config_module
from spec.config import Config
from spec.corpus import TokenSequence
from spec.device import arithmetic, choose_device
from spec.errors import SpecError
from spec.record import ChangedError
from spec.store import answers, identity, upkeep
from spec.store.collection import Collection, check_identity
from spec.store.manifest import Manifest
from spec.store.segment import DamagedError, OutdatedError
from spec.workers import Worker

PROJECT = Path(__file__).resolve().parent.parent
SOURCES = Path("data/sources.json")
MODEL = Path("models/speculator")
TRAINED_BASE = Path("models/trained_base")
CACHE_RESULTS = Path("results/cache")
TRAIN_RESULTS = Path("results/train")
EVALUATE_RESULTS = Path("results/evaluate")
DETAILS = "details.json"
"""Every figure of a stage. metrics.json has the few that a person decides by, under short names: dvc shows them."""
SPLITS = ("train", "val", "eval")
_REMEDIES: dict[type[SpecError], str] = {
    DamagedError: "`spec store verify` sets damaged segments aside, then `spec respond` and `spec cache` compute again "
    "what is missing; or point features.store to the store that has it",
    OutdatedError: "`dvc repro` runs the stages that make it again (`spec respond` and `spec cache` for answers and "
    "features); `spec store gc` removes what is no longer used",
    ChangedError: "`dvc checkout` or `dvc exp apply` brings results back that belong together",
}
"""The commands that repair what an error says, which the library does not know."""


def tokens_path(split: str) -> Path:
    """What tokenize writes."""
    return Path(f"data/tokens/{split}.parquet")


def responses_path(split: str) -> Path:
    """What respond writes."""
    return Path(f"data/responses/{split}.parquet")


def features_path(split: str) -> Path:
    """What cache writes."""
    return Path(f"data/features/{split}.json")


def read_sources() -> dict[str, Any]:
    """What fetch found; a SpecError says that it has not run here."""
    if not SOURCES.is_file():
        raise SpecError(f"{SOURCES} is not here; run the fetch stage first (dvc repro runs every stage that is needed)")
    sources: dict[str, Any] = files.read_json(SOURCES)
    return sources


def base_folder(config: Config, sources: Mapping[str, Any]) -> Path:
    """The folder of the base, at the revision that fetch found."""
    model = config.model
    return base.resolve(model.partial_pretrain, sources["base"]["revision"], model.trust_remote_code)


def stage(body: Callable[..., None]) -> click.Command:
    """A click command around ``body(config, **options)``, with --params and -S, whose errors are one clear message."""

    @functools.wraps(body)
    def run(params: Path, overrides: tuple[str, ...], **options: Any) -> None:
        show_log()
        if options.get("worker"):  # what the launching process has said already
            logging.getLogger("spec.config").setLevel(logging.WARNING)
        with clear_errors():
            config = config_module.load(params, overrides)
            check_listed(params)
            body(config, **options)

    command = click.command(body.__name__.rstrip("_"))(run)
    command.params += [
        click.Option(["--params"], type=click.Path(path_type=Path), default=Path("params.yaml"), show_default=True),
        click.Option(["-S", "--set", "overrides"], multiple=True, metavar="KEY=VALUE", help="Override a parameter."),
    ]
    return command


def show_log() -> None:
    """Show what modules log, on standard error: of the project all, of libraries what is worth a warning."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for noisy in ("httpx", "urllib3", "alembic", "mlflow", "aiobotocore", "botocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def check_listed(params: Path) -> None:
    """Under dvc, raise a SpecError with the lines to add for all keys that the file lacks: dvc itself would miss them
    one stage at a time."""
    pipeline = Path("dvc.yaml")
    if "DVC_STAGE" not in os.environ or not pipeline.is_file():
        return
    yaml = YAML(typ="safe", pure=True)
    stages = yaml.load(pipeline.read_text())["stages"].values()
    read = {key for stage in stages for key in stage.get("params", []) if isinstance(key, str)}
    present = yaml.load(params.read_text()) or {}
    absent = [key for key in sorted(read) if not _has(present, key.split("."))]
    missing = tuple(f"{key}." for key in absent)
    defaults = config_module.defaults().items()
    lines = [f"  {name}: {json.dumps(value)}" for name, value in defaults if f"{name}.".startswith(missing)]
    if lines:
        raise SpecError(
            f"{params} lacks {', '.join(absent)}: dvc stops at a key that a stage reads and that is not there. Add "
            "these defaults to their sections (docs/parameters.md):\n" + "\n".join(lines)
        )


def _has(tree: Any, path: list[str]) -> bool:
    """Whether nested mappings have a key, whatever its value."""
    return not path or (isinstance(tree, dict) and path[0] in tree and _has(tree[path[0]], path[1:]))


def advice(error: SpecError) -> str:
    """An error's message, and the command that repairs it where there is one."""
    remedy = next((text for kind, text in _REMEDIES.items() if isinstance(error, kind)), None)
    return str(error) if remedy is None else f"{error}. {remedy}"


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Turn errors that users can repair into one message without a traceback."""
    try:
        yield
    except SpecError as error:
        raise click.ClickException(advice(error)) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = error.filename or "the disk"
            raise click.ClickException(f"no space left on {where}; free some and run the same command again") from error
        if isinstance(error, FileNotFoundError | PermissionError):
            raise click.ClickException(str(error)) from error
        raise


def progress(total: int, unit: str, label: str, shown: bool = True, done: int = 0) -> tqdm[Any]:
    """A progress bar whose remaining time follows from the average rate; a line every ten seconds without a terminal.

    `unit` is a plural; `done` is how much an earlier run has done, in no time of this one.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        unit=f" {unit}",
        unit_scale=True,
        desc=label,
        smoothing=0,
        mininterval=0.2 if terminal else 10,
        dynamic_ncols=terminal,
        disable=not shown,
    )


@contextlib.contextmanager
def shared_progress(total: int, unit: str, label: str, me: Worker) -> Iterator[Callable[..., None]]:
    """A bar on the first worker that stands for all of them, since each does about the same.

    Gives ``advance(count, total=None)``: what this worker has just done, and a better estimate of all that it will do.
    """
    label = label if me.world == 1 else f"{label} ({me.world} workers)"
    with progress(total, unit, label, shown=me.first) as bar:

        def advance(count: int, total: float | None = None) -> None:
            if total is not None:
                bar.total = max(round(total * me.world), bar.n + count * me.world)
            bar.update(min(count * me.world, bar.total - bar.n))  # type: ignore[operator]  # it has a total

        yield advance


class Estimated:
    """An answers.Answer that calls `advance` with the tokens just written, and an estimate of all tokens.

    `answer` writes the answers, of which `waiting` are to come. The estimate assumes that an answer ends after each of
    its tokens with the same probability, which is the number of ended answers divided by that of written tokens.
    """

    def __init__(self, answer: answers.Answer, waiting: int, advance: Callable[[int, float], object]) -> None:
        self.answer, self.waiting, self.advance = answer, waiting, advance
        self.ended = self.written = 0

    def __call__(
        self, prompts: Sequence[Sequence[int]], limit: int, temperature: float, seeds: Sequence[int], _: object
    ) -> list[list[int]]:
        """Write answers, and tell `advance`."""
        size, counts = len(prompts), [0]
        self.waiting = max(0, self.waiting - size)

        def tell(count: int) -> None:
            counts.append(count)
            self.written += count
            # The first step of a batch writes a token to each answer, and every later one to those that go on. An
            # engine that batches by itself reports tokens one by one, which says nothing about how many go on.
            ended = size - count if counts[1] == size else 0
            mean = self._mean(self.ended + ended, limit)
            rest = max(0.0, size * mean - sum(counts))
            self.advance(count, self.written + rest + self.waiting * mean)

        found = self.answer(prompts, limit, temperature, seeds, tell)
        self.ended += sum(len(each) < limit for each in found)
        self.advance(0, self.written + self.waiting * self._mean(self.ended, limit))
        return found

    def _mean(self, ended: int, limit: int) -> float:
        """The expected length of an answer that has at most `limit` tokens."""
        if not ended:
            return limit
        rate = ended / self.written
        return float((1 - (1 - rate) ** limit) / rate)


def store_root(config: Config) -> Path:
    """Where hidden states and answers are kept on this machine."""
    store = config.features.store
    return Path(store) if store else files.cache_dir() / "store"


def open_manifest(config: Config, split: str) -> Manifest:
    """The split's manifest; a StoreError says that it is missing, or made for another base or kind of training."""
    path = features_path(split)
    manifest = Manifest.load(path)
    base = read_sources()["base"] if SOURCES.is_file() else manifest.base
    found, expected = (
        {"freeze_base_model": frozen, "base": of["weights"], "tokenizer": of["tokenizer"]}
        for frozen, of in ((manifest.frozen, manifest.base), (config.model.freeze_base_model, base))
    )
    check_identity(found, expected, str(path))
    if manifest.frozen and manifest.dtype != config.model.dtype:
        say(f"{path} holds states in {manifest.dtype}, and model.dtype is {config.model.dtype}: run `spec cache`")
    root = store_root(config)
    if manifest.frozen and not upkeep.touch_root(root, path):  # it came with git and DVC, not from a stage here
        upkeep.add_root(root, path, manifest.needed(root))
    return manifest


def check_joint(manifest: Manifest, split: str) -> None:
    """Raise a SpecError where the sequences of joint training are not those that the cache stage saw."""
    path = responses_path(split)
    if not path.is_file() or files.digest_file(path) != manifest.content:
        raise SpecError(
            f"{path} is missing or not the file that {features_path(split)} was made from: run the cache stage"
        )


def arithmetic_here(config: Config) -> str:
    """What the base computes in on this machine."""
    return str(arithmetic(config.model.dtype, choose_device())).removeprefix("torch.")


def read_plan(worker: Path, config: Config) -> Any:
    """A worker's plan; a SpecError where the worker computes otherwise than the stage, which named the results."""
    plan, found = files.read_json(worker), arithmetic_here(config)
    if found != plan["arithmetic"]:
        raise SpecError(
            f"this worker computes in {found}, and the stage that started it in {plan['arithmetic']}: start it on a "
            "machine like those of its workers (a GPU, or the same kind of CPU)"
        )
    return plan


def responses_origin(config: Config, sources: dict[str, Any], computed_in: str) -> dict[str, Any]:
    """What data/responses/SPLIT.parquet depends on besides the tokens, if the base computed in this arithmetic."""
    if not config.base_answers:
        return {"source": "data", "tokenizer": sources["base"]["tokenizer"]}
    return {"source": "base", **identity.answers(sources["base"], config.model.dtype, config.respond, computed_in)}


def read_responses(config: Config, split: str, sources: dict[str, Any]) -> list[TokenSequence]:
    """What respond wrote, in whatever arithmetic; a StoreError names what differs from these parameters and base."""
    path = responses_path(split)
    found = corpus.read_origin(path)
    check_identity(found, responses_origin(config, sources, found.get("arithmetic", "")), str(path))
    return corpus.read(path)


def known_rows(collection: Collection, name: str) -> dict[str, tuple[str, int]]:
    """Where the rows of a collection lie; it is made where it is missing, and damaged segments are set aside first.
    `name` is the stage's."""
    collection.create()
    for damaged, error in collection.survey()[1].items():
        target = collection.set_aside(damaged)
        say(f"{name}: segment {damaged} is damaged ({error.reason}): moved to {target}, its rows are computed again")
    return collection.find()


def say_computed_elsewhere(collection: Collection, missing: Set[str], name: str) -> None:
    """Say how many of the missing rows the store has in another arithmetic."""
    here = collection.identity["arithmetic"]
    for other in sorted({"bfloat16", "float16", "float32"} - {here}):
        elsewhere = Collection(collection.root, collection.kind, {**collection.identity, "arithmetic": other})
        count = len(missing & elsewhere.find().keys())
        if count:
            say(f"{name}: the store has {count} of them computed in {other}; here they are computed again, in {here}")


def need_space(
    path: Path, needed: int, what: str, remedy: str = "set features.store to a folder on a larger disk"
) -> None:
    """Raise a SpecError before any work where `what` needs more bytes than the disk has."""
    free = files.free_bytes(path)
    if needed > free:
        raise SpecError(
            f"{what} needs up to {size(needed)} in {path}, where {size(free)} are free; free some, or {remedy}"
        )


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def run_workers(config: Config, module: str, plan: Any) -> None:
    """Run ``python -m module --worker`` under trainer.launcher with a config and a plan, and wait for it; SIGTERM and
    SIGINT are passed on. A SpecError says that it could not be started, or that a worker failed."""
    launcher = list(config.trainer.launcher) or [sys.executable]
    if launcher[0] == "torchrun":
        launcher[:1] = [sys.executable, "-m", "torch.distributed.run"]
    # In the working directory, since workers may run on other machines that share it.
    with files.scratch(Path(), "workers") as folder:
        params, plan_path = folder / "params.yaml", folder / "plan.json"
        config_module.save(config, params)
        plan_path.write_text(json.dumps(plan))
        command = [*launcher, "-m", module, "--params", str(params), "--worker", str(plan_path)]
        # Workers that are asked to stop save first; torchrun's own patience is half a minute. Workers that torchrun
        # starts again must not meet in the store that it shares by default: the dead ones' addresses are in it. What a
        # library will change one day is nothing for users.
        torchrun = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        torchrun |= {"PYTHONWARNINGS": "ignore::FutureWarning"}
        try:
            process = subprocess.Popen(command, env={**torchrun, **child_environment()})
        except OSError as error:
            raise SpecError(f"trainer.launcher: {launcher[0]!r} could not be started ({error.strerror})") from None
        with on_signals(process.send_signal, signal.SIGTERM, signal.SIGINT):
            status = process.wait()
    if status:
        raise SpecError(f"a worker failed (exit status {status}); its message is above")


@contextlib.contextmanager
def on_signals(handle: Callable[[int], object], *numbers: int) -> Iterator[None]:
    """Call `handle` with the number of each of these signals that comes within the block."""
    previous = {number: signal.signal(number, lambda came, _: handle(came)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def child_environment() -> dict[str, str]:
    """This process's environment, for one that finds the project's modules from any working directory."""
    paths = filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


say: Callable[[str], None] = click.echo
"""Tell the user something, on standard output."""

worker_option = click.option("--worker", type=click.Path(path_type=Path), hidden=True)
"""Marks a process that trainer.launcher started; names its plan."""

"""What the tests of training share: a tiny run, and other processes that take part in one or are killed in it."""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spec import base as base_model
from spec import config as config_module
from spec import workers
from spec.base import Teacher
from spec.config import Config
from spec.corpus import TokenSequence
from spec.errors import SpecError
from spec.heads import Speculator, build, parse_config
from spec.store.manifest import Manifest
from spec.store.reader import FeatureReader
from spec.training import loop
from spec.training.frozen import FrozenTask
from spec.training.joint import JointTask
from spec.training.loop import Progress, Result
from spec.training.resume import Checkpoints
from spec.workers import Worker, joined
from stages.common import child_environment, on_signals
from tests.forked import free_port
from tests.tiny import chain, sequence, states_of, store_features

V, D, N = 24, 8, 3
ALONE = Worker(0, 1, torch.device("cpu"))
TOTAL = 16  # two epochs of 30 sequences, 4 a step
VALUES: dict[str, Any] = {
    "data": {"train_batch_size": 4, "micro_batch_size_per_gpu": 4},
    "model": {"dtype": "float32", "speculator": {"n_predict": N}},
    "optim": {"lr": 0.01},
    "trainer": {"total_epochs": 2, "test_freq": 5, "save_freq": 3},
}
TIMING = {"positions_per_second", "data_wait", "memory_gb"}
Body = Callable[[Connection, Any], object]
Make = Callable[[Worker], Any]
"""Makes a worker's task."""


def make_config(**changed: dict[str, Any]) -> Config:
    named = VALUES | {key: {**VALUES.get(key, {}), **values} for key, values in changed.items()}
    return config_module.from_mapping(named)


def make_speculator(method: Any = "sum_rnn", seed: int = 0, **changed: Any) -> Speculator:
    """With random weights; a draft vocabulary is the last ids."""
    shape: dict[str, Any] = {"inner_dim": (16,), "emb_dim": (16,), "proj_dim": (16,), "n_predict": N}
    shape |= {"hidden_size": D, "vocab_size": V, "base_model_name_or_path": "", "base_digest": ""}
    config = parse_config({"method": method, **shape, **changed})
    drafted = config.draft_vocab_size
    speculator = build(config, None if drafted is None else torch.arange(config.vocab_size)[-drafted:])
    speculator.initialise(seed=seed)
    return speculator


def make_store(root: Path, states: Callable[[TokenSequence], NDArray[np.float32]] = states_of) -> Path:
    """30 sequences to train on and 7 for val."""
    for split, rows in {"train": chain(30, V), "val": chain(7, V, seed=1)}.items():
        store_features(root, rows, vocab_size=V, hidden_size=D, states=states).save(root / f"{split}.json")
    return root


def readers_of(store: Path) -> tuple[FeatureReader, FeatureReader]:
    train, val = (FeatureReader(Manifest.load(store / f"{split}.json"), store) for split in ("train", "val"))
    return train, val


def teacher(config: Config) -> Teacher | None:
    """An lm_head that has something to say, where it is asked."""
    lm_head = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    return Teacher(lm_head) if config.optim.loss == "kl" else None


def run(
    store: Path,
    checkpoints: Path,
    config: Config | None = None,
    speculator: Speculator | None = None,
    listen: Callable[[Progress], None] = lambda progress: None,
) -> tuple[Result, Speculator]:
    """Train on a store; the heads as they are at the last step."""
    task = frozen_task(config or make_config(), store, ALONE, speculator)
    return loop.run(task, Checkpoints(checkpoints, "key"), listen), task.speculator


class InterruptedRunError(Exception):
    """What ends a run in the middle."""


def interrupt(split: str, step: int) -> Callable[[Progress], None]:
    def listen(progress: Progress) -> None:
        if (progress.split, progress.step) == (split, step):
            raise InterruptedRunError

    return listen


def steps_of(told: list[Progress], split: str) -> list[int]:
    return [progress.step for progress in told if progress.split == split]


def losses_of(told: list[Progress], name: str = "speculator_loss") -> list[float]:
    return [progress.metrics[name] for progress in told if progress.split == "train"]


def history_of(told: list[Progress]) -> list[Any]:
    """Everything that was told, but for what a clock or the machine says."""
    return [[p.split, p.step, p.total, {name: p.metrics[name] for name in p.metrics.keys() - TIMING}] for p in told]


_LOADED = ["torch._dynamo", "stages.train"]
_LOADED += [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "qwen2")]


def _context() -> Any:
    """Processes made by a server that has all modules loaded, so that each starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    with mock.patch.dict(os.environ, child_environment()):  # the modules of this checkout
        forkserver.ensure_running()
    return context


def _enter(body: Body, connection: Connection, environment: dict[str, str], arguments: Any) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    workers.choose_device = lambda: torch.device("cpu")
    try:
        body(connection, arguments)
    except SpecError as error:
        connection.send(str(error))
        sys.exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(99)


@contextmanager
def process(body: Body, arguments: Any, **environment: str) -> Iterator[tuple[BaseProcess, Connection]]:
    """A process that runs ``body(connection, arguments)`` until the block ends, and the other end of its connection;
    it sends the message of a SpecError and exits with 1."""
    context = _context()
    ours, its = context.Pipe()
    made = context.Process(target=_enter, args=(body, its, environment, arguments))
    made.start()
    its.close()
    try:
        yield made, ours
    finally:
        made.kill()
        made.join()
        ours.close()


def together(world: int, body: Body, arguments: Any) -> list[tuple[int | None, list[Any]]]:
    """Run `world` workers of one run; the exit code of each, and what it sent."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    with contextlib.ExitStack() as stack:
        entered = [
            stack.enter_context(process(body, arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared))
            for rank in range(world)
        ]
        sent = [list(received(connection)) for _, connection in entered]
        for made, _ in entered:
            made.join(600)
        return [(made.exitcode, messages) for (made, _), messages in zip(entered, sent, strict=True)]


def received(connection: Connection) -> Iterator[Any]:
    while True:
        if not connection.poll(600):
            raise TimeoutError("the process says nothing")
        try:
            yield connection.recv()
        except EOFError:
            return


def weights_of(task: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in task.tensors().items()}


def outcome(task: Any, checkpoints: Path, stopping: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """All that a run comes to, from its newest checkpoint on, as torch.save keeps it."""
    told: list[Progress] = []
    result = loop.run(task, Checkpoints(checkpoints, "key"), told.append, stopping)
    return {
        "last": weights_of(task),
        "best": result.weights,
        "figures": [result.step, result.steps, result.val],
        "history": history_of(told),
    }


def assert_same_outcome(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit."""
    assert found["history"] == expected["history"]
    assert found["figures"] == expected["figures"]
    for part in ("last", "best"):
        assert found[part].keys() == expected[part].keys()
        for name, weight in expected[part].items():
            assert torch.equal(found[part][name], weight), (part, name)


def run_to_the_end(connection: Connection, arguments: tuple[Make, Path]) -> None:
    """What a process runs that may be stopped at any time: it says each step that it begins, and keeps the outcome."""
    make, folder = arguments
    asked = threading.Event()
    with on_signals(lambda _: asked.set(), signal.SIGTERM):
        with joined() as me:

            def stopping() -> bool:
                connection.send("step")
                return asked.is_set()

            torch.save(outcome(make(me), folder / "checkpoints", stopping), folder / f"outcome-{me.rank}.pt")
        os._exit(0)  # a signal that comes now is too late


def load_outcome(folder: Path, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"outcome-{rank}.pt", weights_only=True)


def assert_workers_agree(make: Make, folder: Path, world: int, atol: float, close: float) -> None:
    """Several workers come out where one does: each with the same weights, and the first with the same figures."""
    expected = outcome(make(ALONE), folder / "alone")
    ends = together(world, run_to_the_end, (make, folder))
    assert [code for code, _ in ends] == [0] * world
    for rank in range(world):
        found = load_outcome(folder, rank)
        for part in ("last", "best") if rank == 0 else ("last",):
            for name, weight in expected[part].items():
                torch.testing.assert_close(found[part][name], weight, rtol=0, atol=atol, msg=name)
        assert found["figures"][:2] == expected["figures"][:2]
        assert found["figures"][2] == pytest.approx(expected["figures"][2], abs=close)
        assert bool(found["history"]) == (rank == 0)
        for (*place, mine), (*other, wanted) in zip(found["history"], expected["history"], strict=rank == 0):
            assert place == other
            assert mine == pytest.approx(wanted, rel=10 * close, abs=close)


def interrupted(make: Make, folder: Path, sent: signal.Signals) -> list[tuple[Any, Any]]:
    """Run in ten processes that get a signal at a random moment within twelve steps, and at last in one that gets none;
    of each its exit code and the last thing it said."""
    folder.mkdir()
    moments = random.Random(int(sent))
    ends = []
    for left in range(10, -1, -1):
        steps, delay = moments.randrange(12), moments.uniform(0, 0.02)
        with process(run_to_the_end, (make, folder)) as (made, connection):
            said = [None]
            for message in received(connection):
                said.append(message)
                if left and len(said) == steps + 2:
                    time.sleep(delay)
                    assert made.pid
                    with contextlib.suppress(ProcessLookupError):  # it is done
                        os.kill(made.pid, sent)
            made.join(600)
            ends.append((made.exitcode, said[-1]))
    return ends


def frozen_task(config: Config, store: Path, worker: Worker, speculator: Speculator | None = None) -> FrozenTask:
    return FrozenTask(config, speculator or make_speculator(), *readers_of(store), worker, teacher(config))


def make_frozen(store: Path, worker: Worker) -> FrozenTask:
    """A run of 112 steps that logs every tenth, and saves in between."""
    return frozen_task(make_config(trainer={"total_epochs": 14, "test_freq": 7, "save_freq": 3}), store, worker)


JOINT = {
    "model": {"freeze_base_model": False, "speculator_loss_coeff": 0.5},
    "respond": {"source": "data"},
    "data": {"train_batch_size": 4, "micro_batch_size_per_gpu": 2},
    "optim": {"lr": 0.01, "base_lr": 0.002},
    "trainer": {"total_epochs": 5, "test_freq": 4, "save_freq": 3},
}


def joint_config(**changed: dict[str, Any]) -> Config:
    named = JOINT | {key: JOINT.get(key, {}) | values for key, values in changed.items()}
    return make_config(**named)


def joint_rows(count: int, seed: int) -> list[TokenSequence]:
    """Sequences that a base can learn; every third has a second turn."""
    rows = chain(count, V, seed)
    for index in range(0, count, 3):
        row = rows[index]
        rows[index] = sequence([*row.mask[:5], 0, 0, *row.mask[7:]], row.ids, row.domain)
    return rows


def joint_task(config: Config, folder: Path, worker: Worker, train: int = 22, val: int = 5) -> JointTask:
    """Over a base's own folder; nothing is written there."""
    base = base_model.load(config.model, folder, "digest", worker.device, dtype="float32")
    shape = {"hidden_size": base.hidden_size, "vocab_size": base.vocab_size}
    speculator = make_speculator(**shape)
    return JointTask(config, base, speculator, joint_rows(train, 0), joint_rows(val, 1), worker)


def in_float64(task: JointTask) -> JointTask:
    """Where a gradient is next to nothing, AdamW makes a step of its sign: float32's rounding would decide it."""
    task.module.double()
    return task


def make_joint(folder: Path, worker: Worker) -> JointTask:
    """A run of 30 steps."""
    return joint_task(joint_config(), folder, worker)


def make_exact_joint(folder: Path, worker: Worker) -> JointTask:
    return in_float64(make_joint(folder, worker))

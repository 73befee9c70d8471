"""A process that lets children of its own fill stores, and kills them; it reads its tasks from stdin.

It has loaded everything when it forks, and has started no thread, so that a child begins at once.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spec import base as base_model
from spec.base import Base
from spec.config import Model, Respond
from spec.heads import LAST
from spec.store import answers, features, identity
from spec.store.codecs import ZSTD
from spec.store.collection import Collection
from spec.store.features import FeatureRow, TapStore
from spec.store.plan import item_key
from tests.forked import run_killing

DIGESTS = {"weights": "w", "tokenizer": "t", "generation": "g"}
RESPOND = Respond(max_new_tokens=3, batch_size=1, temperature=1.0)
COUNT = 14
"""Segments of a run."""


def collection(root: Path, kind: str) -> Collection:
    """Where a run's segments go."""
    if kind == "states":
        return Collection(root, kind, identity.states(DIGESTS, "float32", LAST, ZSTD, "float32"))
    return Collection(root, kind, identity.answers(DIGESTS, "float32", RESPOND, "float32"))


def fill(base: Base, root: Path, kind: str) -> None:
    """What the stages cache and respond do with a store: clean it, plan, and compute what is missing."""
    made = collection(root, kind)
    made.create()
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 290, 20 + number).astype(np.int32) for number in range(COUNT)]
    if kind == "states":
        masks = [np.resize(np.asarray([0, 1, 1], np.uint8), len(row)) for row in rows]
        keyed = [FeatureRow(item_key(row, mask), row, mask) for row, mask in zip(rows, masks, strict=True)]
        groups = features.plan(keyed, [made.find()], 1)
        features.produce(base, [TapStore(LAST, ZSTD, made)], keyed, groups)
    else:
        groups = answers.plan(rows, made.find(), 1, base_model.prompt_bucket)
        answers.produce(partial(base_model.answer, base), {}, made, rows, groups, RESPOND)


def logging_claims(path: Path) -> None:
    """Write the name of each segment that this process begins to a file, which outlives it."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    real = Collection.claim

    def claim(self: Collection, items: Sequence[str], wait: bool = False) -> Any:
        claimed = real(self, items, wait)
        if claimed is not None:
            os.write(log, f"{self.name_of(items)}\n".encode())
        return claimed

    Collection.claim = claim  # type: ignore[method-assign]


def run(base: Base, root: str, kind: str, log: str, delay: float | None = None) -> dict[str, Any]:
    """Fill a store in a child, as run_killing does."""

    def body() -> None:
        logging_claims(Path(log))
        fill(base, Path(root), kind)

    return run_killing(body, delay)


def serve(body: Callable[..., dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # as in all tests
    for line in sys.stdin:
        print(json.dumps(body(**json.loads(line))), flush=True)


@contextlib.contextmanager
def serving(module: str, *arguments: str) -> Iterator[Callable[..., dict[str, Any]]]:
    """Start a module that serves; gives what lets it run a task."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).parents[3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **single},
    )
    sent, received = process.stdin, process.stdout

    def task(**options: Any) -> dict[str, Any]:
        sent.write(json.dumps(options) + "\n")
        sent.flush()
        return json.loads(received.readline())

    yield task
    sent.close()
    assert process.wait(20) == 0
    received.close()


if __name__ == "__main__":
    serve(partial(run, base_model.load(Model(), Path(sys.argv[1]), "digest", torch.device("cpu"), dtype="float32")))

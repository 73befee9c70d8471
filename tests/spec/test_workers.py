"""Workers: alone without a launcher, and together with gloo."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from spec import workers as workers_module
from spec.workers import Worker, joined, this_worker
from tests.tiny import with_instructions


def work(rank: int, port: int, folder: Path) -> None:
    """What each of two processes does."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    with joined() as me:
        total = me.sum(torch.tensor([1.0, me.rank]))
        gathered = me.gather({"rank": me.rank, "list": [0] * me.rank})
        answer = {"first": me.first, "world": me.world, "sum": total.tolist(), "gathered": gathered}
    assert not torch.distributed.is_initialized()
    (folder / f"{rank}.json").write_text(json.dumps(answer))


def test_alone_without_a_launcher() -> None:
    worker = this_worker()
    assert (worker.rank, worker.world, worker.first) == (0, 1, True)
    assert worker.sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert worker.gather("x") == ["x"]
    with joined() as same:
        assert same == worker
        assert not torch.distributed.is_initialized()


def test_workers_sum_and_gather(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "choose_device", lambda: torch.device("cpu"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A fork needs no imports, which take longer than all else here.
    processes = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = [processes.Process(target=work, args=(rank, port, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        worker.kill()
    assert [worker.exitcode for worker in workers] == [0, 0]
    gathered = [{"rank": 0, "list": []}, {"rank": 1, "list": [0]}]
    for rank in range(2):
        answer = json.loads((tmp_path / f"{rank}.json").read_text())
        assert answer == {"first": rank == 0, "world": 2, "sum": [2.0, 1.0], "gathered": gathered}


@pytest.mark.parametrize(
    ("dtype", "instructions", "device", "mixed"),
    [
        ("bfloat16", ["avx512_bf16"], "cpu", True),
        ("float16", ["avx512_bf16"], "cpu", True),
        ("float32", ["avx512_bf16"], "cpu", False),
        ("bfloat16", ["avx2"], "cpu", False),
        ("bfloat16", [], "cuda", True),
        ("float32", [], "cuda", False),
    ],
)
def test_training_is_mixed_where_the_device_has_bfloat16(
    dtype: str, instructions: list[str], device: str, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_instructions(monkeypatch, *instructions)
    assert Worker(0, 1, torch.device(device)).mixed(dtype) is mixed

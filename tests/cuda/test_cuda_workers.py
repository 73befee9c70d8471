"""What goes to the device and comes back; and workers under torchrun, each on the device of its local rank."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from spec.device import fetch, mark, send, synchronize
from stages.common import child_environment

WORKER = """
import json, sys, torch
from pathlib import Path
from spec import workers
if sys.argv[1] == "cpu":
    workers.choose_device = lambda: torch.device("cpu")
with workers.joined() as me:
    current = torch.cuda.current_device() if me.device.type == "cuda" else None
    total = me.sum(torch.ones(2, device=me.device) * (me.rank + 1))
    found = [me.rank, me.device.type, me.device.index, current, total.tolist()]
    Path(__file__).with_name(f"{me.rank}.json").write_text(json.dumps(found))
"""


def test_each_worker_takes_the_device_of_its_local_rank(device: torch.device, tmp_path: Path) -> None:
    cuda = device.type == "cuda"
    world = torch.cuda.device_count() if cuda else 2
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += [str(script), device.type]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    total = [world * (world + 1) / 2] * 2
    for rank in range(world):
        own = rank if cuda else None
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [rank, device.type, own, own, total]


def test_what_is_sent_and_fetched_is_the_same(device: torch.device) -> None:
    numbers = torch.arange(1000)
    there = send(numbers, device)
    assert there.device == device
    assert torch.equal(fetch(there * 2)(), numbers * 2)


def test_the_device_is_done_after_it_was_waited_for(device: torch.device) -> None:
    matrix = torch.randn(2048, 2048, device=device)
    for _ in range(20):
        matrix = matrix @ matrix / 2048
    done = mark(device)
    synchronize(device)
    assert done()

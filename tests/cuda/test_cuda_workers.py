"""Workers under torchrun: each takes the device of its local rank, and they add up what they have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

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
    done = subprocess.run(
        [*command, script, device.type], env=child_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    total = [world * (world + 1) / 2] * 2
    for rank in range(world):
        own = rank if cuda else None
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [rank, device.type, own, own, total]

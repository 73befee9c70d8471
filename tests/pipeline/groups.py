"""Two groups of workers on one host, as two nodes have them: what srun does in a cluster, a script does here."""

import csv
import sys
from pathlib import Path

from tests.forked import free_port

CURVES = {
    "train": ("step", "speculator_loss", "accuracy.1", "accuracy.3", "lr", "grad_norm", "positions_seen"),
    "val": ("step", "speculator_loss", "tokens_per_step", "positions_seen"),
}
"""Columns of the curves that do not depend on the clock."""

_SCRIPT = """
import subprocess, sys
port, *arguments = sys.argv[1:]
torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
torchrun += [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", "--local-addr=127.0.0.1", *arguments]
groups = [subprocess.Popen(torchrun) for _ in range(2)]
sys.exit(max(abs(group.wait()) for group in groups))
"""


def two_groups(folder: Path, *options: str) -> str:
    """A trainer.launcher that starts two torchruns of one worker each, which meet at a port of this host."""
    script = folder / "two_groups.py"
    script.write_text(_SCRIPT)
    return " ".join([sys.executable, str(script), str(free_port()), *options])


def curve(folder: Path, split: str) -> list[list[float]]:
    """Those columns of results/train/SPLIT.csv."""
    with (folder / f"results/train/{split}.csv").open() as file:
        return [[float(row[name]) for name in CURVES[split]] for row in csv.DictReader(file)]

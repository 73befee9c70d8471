"""deploy/slurm.sbatch and deploy/srun_torchrun.sh, with Slurm's commands played by scripts: two nodes on one host."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages import common
from tests.stages.workspace import content, copy_of, prepare, run_through

pytestmark = pytest.mark.slow

SRUN = """
import os, signal, subprocess, sys
command = sys.argv[sys.argv.index("python") + 1:]
assert command[:2] == ["-m", "torch.distributed.run"]
command[2:2] = ["--local-addr=127.0.0.1"]  # a name that resolves is the cluster's business
nodes = [subprocess.Popen([sys.executable, *command]) for _ in range(int(os.environ["SLURM_JOB_NUM_NODES"]))]
with open(os.environ["FAKE_STATE"] + "/nodes", "w") as file:
    file.write(" ".join(str(node.pid) for node in nodes))
sys.exit(max(abs(node.wait()) for node in nodes))
"""
SCANCEL = 'test "$1" = --signal=TERM && test "$2" = 4242 && kill -TERM $(cat "$FAKE_STATE/nodes")'
SCONTROL = """case "$1 $2" in
"show hostnames") echo 127.0.0.1; echo second ;;
"show job") echo "   PreemptTime=$FAKE_PREEMPT" ;;
*) echo "$*" >> "$FAKE_STATE/asked" ;;
esac"""


class Cluster:
    """A folder in which the batch script runs."""

    def __init__(self, folder: Path, bin_folder: Path) -> None:
        self.folder = folder
        self.asked = folder / "asked"
        (folder / ".venv/bin").mkdir(parents=True)
        (folder / ".venv/bin/activate").touch()
        bin_folder.mkdir(exist_ok=True)
        scripts = {"srun": f"#!{sys.executable}\n{SRUN}"}
        scripts |= {"scancel": f"#!/bin/sh\n{SCANCEL}\n", "scontrol": f"#!/bin/sh\n{SCONTROL}\n"}
        for name, text in scripts.items():
            (bin_folder / name).write_text(text)
            (bin_folder / name).chmod(0o755)
        self._environment = common.child_environment() | {
            "PATH": os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            "FAKE_STATE": str(folder),
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
        }

    def submit(self, *command: str, preempted: str = "None") -> subprocess.Popen[str]:
        command = ("bash", str(common.PROJECT / "deploy/slurm.sbatch"), *command)
        environment = self._environment | {"FAKE_PREEMPT": preempted}
        return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=-1, stderr=-2, text=True)


def test_a_stopped_job_saves_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    ready = prepare(tmp_path / "ready")
    run_through(ready, "cache")
    whole, parts = (Cluster(copy_of(ready, tmp_path / name), tmp_path / "bin") for name in ("whole", "parts"))
    train = ["python", "-m", "stages.cli", "train"]
    train += ["-S", f"trainer.launcher={common.PROJECT}/deploy/srun_torchrun.sh", "-S", "trainer.total_epochs=20"]
    train += ["-S", "trainer.save_freq=5", "-S", "trainer.test_freq=20"]
    job = whole.submit(*train)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert not whole.asked.exists()

    job = parts.submit(*train)
    deadline = time.monotonic() + 300
    while not list(parts.folder.glob("checkpoints/*/global_step_*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    job.terminate()  # as --signal=B:TERM does: to the script, not to what it started
    said, _ = job.communicate(timeout=300)
    assert job.returncode != 0
    assert "run the same command again to go on" in said
    assert parts.asked.read_text() == "requeue 4242\n"
    assert not (parts.folder / common.MODEL).exists()

    job = parts.submit(*train)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert "resuming at step" in said
    assert parts.asked.read_text() == "requeue 4242\n"
    assert content(parts.folder / "models") == content(whole.folder / "models")


@pytest.mark.parametrize(("preempted", "asked"), [("2026-01-31T12:00:00", True), ("None", False)])
def test_of_jobs_that_fail_only_a_preempted_one_is_queued_again(tmp_path: Path, preempted: str, asked: bool) -> None:
    cluster = Cluster(tmp_path, tmp_path / "bin")
    job = cluster.submit("sh", "-c", "exit 3", preempted=preempted)
    job.communicate(timeout=60)
    assert job.returncode == 3
    assert cluster.asked.exists() is asked

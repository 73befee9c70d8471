"""The check: `python -m bench.gpu --minutes 8 --out DIR`.

Sections run one after the other, the most important first, each in a process of its own: what one of them breaks
does not reach the next. Every figure is written to DIR/figures.csv as soon as it is known; DIR/report.md has them all
in the end. Needs no network, no DVC and no MLflow.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import metadata
from pathlib import Path

import torch

from bench.common import machine
from bench.gpu.check import SHARES, Check, read
from bench.gpu.sizes import FULL, SMALL
from spec.device import choose_device
from spec.lineage import git_state
from stages.common import child_environment

PACKAGES = ("torch", "transformers", "numpy", "zarr", "zarrs", "numcodecs", "pyarrow", "pydantic")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=8, help="no section begins or goes on after them")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder for the results")
    parser.add_argument("--device", default=choose_device().type, help="default: the GPU where there is one")
    parser.add_argument("--small", action="store_true", help="a dry run: every step, in sizes that mean nothing")
    parser.add_argument("--section", choices=SHARES, help="only this one")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # given to a section's own process
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work is not None:
        section(asked)
        return
    if asked.out.exists() and any(asked.out.iterdir()):
        parser.error(f"{asked.out} is not empty")
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as work:
        failed = run(asked, Path(work))
    print(f"\n{report(asked)}")
    sys.exit(1 if failed else 0)


def run(asked: argparse.Namespace, work: Path) -> list[str]:
    """All sections, as far as the minutes go; returns those that failed or were left out."""
    whole = 60 * asked.minutes
    end, failed = time.time() + whole, []
    for name in [asked.section] if asked.section else SHARES:
        began = time.time()
        until = end if asked.section else min(end, began + whole * SHARES[name])
        command = [sys.executable, "-m", "bench.gpu", *sys.argv[1:], "--section", name]
        problem = in_time([*command, "--work", str(work), "--until", str(until)], until - began)
        with (asked.out / "sections.txt").open("a") as file:
            file.write(f"{name}: {time.time() - began:.0f} s{f', {problem}' if problem else ''}\n")
        if problem:
            failed.append(name)
            print(f"{name}: {problem}", flush=True)
        report(asked)
    return failed


def in_time(command: list[str], seconds: float) -> str:
    """Run a command, and end it with all that it has started when its time is over; what went wrong, if anything."""
    if seconds < 1:
        return "left out: no time was left"
    environment = {**child_environment(), "HF_HUB_OFFLINE": "1"}
    environment.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)  # some images set it, and float32 is not exact then
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        status = process.wait(seconds)
        return f"failed (exit status {status})" if status else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its workers, which are in sessions of their own
        time.sleep(3)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "cut off: its time was over"


def section(asked: argparse.Namespace) -> None:
    """One section, in this process."""
    device = torch.device(asked.device)
    if device.type == "cuda":
        device = choose_device()
        torch.cuda.set_device(device)
    sizes = SMALL if asked.small else FULL
    check = Check(asked.section, device, sizes, asked.out, asked.work, asked.until)
    try:
        importlib.import_module(f"bench.gpu.{asked.section}").run(check)
    except Exception:
        with (asked.out / "errors.txt").open("a") as file:
            file.write(f"== {asked.section}\n{traceback.format_exc()}\n")
        raise


def report(asked: argparse.Namespace) -> str:
    """Write report.md, and return it."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    dry = "**A dry run: these figures mean nothing.** They show that each of them can be measured.\n\n"
    table = [["section", "figure", "value", "expected"], ["---"] * 4, *read(asked.out)]
    text = (
        f"# bench.gpu\n\n{dry if asked.small or asked.device == 'cpu' else ''}"
        f"{machine()}; Python {platform.python_version()}, {versions}\n\n"
        f"Commit {git_state()[0]}; sections: {' '.join((asked.out / 'sections.txt').read_text().splitlines())}\n\n"
        + "".join(f"| {' | '.join(row)} |\n" for row in table)
    )
    (asked.out / "report.md").write_text(text)
    return text


if __name__ == "__main__":
    main()

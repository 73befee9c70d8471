"""Right: the tests marked cuda."""

from __future__ import annotations

import re
import subprocess
import sys

from bench.gpu.check import Check
from stages.common import PROJECT, child_environment


def run(check: Check) -> None:
    """Run them, and keep what pytest says in tests.txt."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "--device", check.device.type, "tests/cuda"]
    command += ["-q", "-rs", "--disable-warnings", "-p", "no:cacheprovider", f"--basetemp={check.work / 'pytest'}"]
    with (check.out / "tests.txt").open("w") as log:
        done = subprocess.run(
            command, cwd=PROJECT, env=child_environment(), stdout=log, stderr=log, timeout=check.left()
        )
    text = (check.out / "tests.txt").read_text()
    found = re.findall(r"^=*\s*((?:\d+ (?:passed|failed|skipped|errors?)(?:, )?)+).* in [\d.]+s", text, re.MULTILINE)
    if found:
        check.figure("tests", found[-1].removesuffix(", "), "all pass")
    if done.returncode or not found:
        raise RuntimeError(f"pytest ended with exit status {done.returncode}; the end of tests.txt: {text[-2000:]}")

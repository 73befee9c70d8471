"""What every stage's command shares: options, errors, space, workers."""

import errno
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from spec import config as config_module
from spec import files
from spec.config import Config
from spec.errors import SpecError
from spec.record import ChangedError
from spec.store.segment import DamagedError, OutdatedError, StoreError
from stages import common


@pytest.mark.parametrize(
    ("error", "message"),
    [
        *((kind("what to do"), "what to do") for kind in SpecError.__subclasses__()),
        (DamagedError(Path("store"), "s", "gone"), r"or damaged \(gone\)\. `spec store verify` .*`spec cache`"),
        (OutdatedError("x"), "x. `dvc repro` .*`spec respond` and `spec cache` .*`spec store gc`"),
        (ChangedError("x"), "x. `dvc checkout` or `dvc exp apply`"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "no space left on /data/x; free some"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/data/x"), "/data/x"),
    ],
)
def test_errors_that_users_can_repair_are_one_message(error: Exception, message: str) -> None:
    with pytest.raises(click.ClickException, match=message), common.clear_errors():
        raise error


@pytest.mark.parametrize("error", [ValueError("a defect"), KeyError("x"), OSError(errno.EIO, "broken")])
def test_defects_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as found, common.clear_errors():
        raise error
    assert found.value is error


@pytest.fixture
def command() -> click.Command:
    """A stage that tells what it was given."""

    @common.worker_option
    @common.stage
    def example(config: Config, worker: Path | None) -> None:
        """Say the rate."""
        if config.optim.lr == 3:
            raise StoreError("segment x is missing")
        common.say(f"lr {config.optim.lr} worker {worker}")

    return example


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "params.yaml"
    path.write_text("optim: {lr: 2}\n")
    return path


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 0, "lr 2.0 worker None\n"),
        (["--set", "optim.lr=4", "-S", "optim.lr=6"], 0, "lr 6.0 worker None\n"),
        (["--params", "other.yaml", "--worker", "plan.json"], 0, "lr 5.0 worker plan.json\n"),
        (["--help"], 0, "Say the rate."),
        (["-S", "optim.rate=1"], 1, "optim.rate: unknown key"),
        (["-S", "optim.lr=3"], 1, "Error: segment x is missing"),
        (["--params", "nowhere.yaml"], 1, "Error: nowhere.yaml: no such parameter file"),
    ],
)
def test_stages_read_params(command: click.Command, params: Path, arguments: list[str], status: int, said: str) -> None:
    (params.parent / "other.yaml").write_text("optim: {lr: 5}\n")
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == status
    assert said in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)  # no traceback


def test_keys_that_dvc_misses_are_shown(command: click.Command, params: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("dvc.yaml").write_text("stages: {fetch: {cmd: x}, a: {params: [data.date, decode]}, b: {params: [optim.lr]}}")
    assert CliRunner().invoke(command).exit_code == 0
    monkeypatch.setenv("DVC_STAGE", "fetch")
    result = CliRunner().invoke(command)
    assert result.exit_code == 1
    assert "Error: params.yaml lacks data.date, decode: dvc stops" in result.output
    first, *lines = result.output.splitlines()[1:]
    assert first == '  data.date: "2026-01-01"'
    fields = [line.split(":")[0] for line in lines]
    assert fields == [f"  decode.{name}" for name in type(Config().decode).model_fields]
    params.write_text("optim: {lr: 2}\ndata: {date: '2026-01-01'}\ndecode:\n")
    assert CliRunner().invoke(command).exit_code == 0


def test_space_is_looked_at_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    common.need_space(tmp_path, 1000, "cache")
    with pytest.raises(SpecError, match=r"cache needs up to 1\.0 kB in .*, where 1\.0 kB are free.*features\.store"):
        common.need_space(tmp_path, 1001, "cache")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_540_000, "1.5 MB"), (2e9, "2.0 GB"), (3.25e15, "3250.0 TB")],
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert common.size(count) == text


def test_the_store_is_the_users_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert common.store_root(Config()) == Path("/cache/speculator-training/store")


def test_sources_that_fetch_has_not_written(params: Path) -> None:
    with pytest.raises(SpecError, match=r"data/sources\.json is not here; run the fetch stage"):
        common.read_sources()


WORKER = """
import shutil, json, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
shutil.copy(arguments["--params"], "told.yaml")
shutil.copy(arguments["--worker"], "told.json")
sys.exit(json.load(open("told.json")).get("exit", 0))
"""

PATIENT = """
import os, signal, sys, time
from pathlib import Path
def leave(number, frame):
    Path("saved").write_text(str(number))
    sys.exit(7)
signal.signal(signal.SIGTERM, leave)
Path("ready").write_text("")
time.sleep(30)
"""


def launched(*launcher: str, **values: Any) -> Config:
    return config_module.from_mapping({"trainer": {"launcher": shlex.join(launcher)}, **values})


@pytest.fixture
def module(params: Path) -> Iterator[str]:
    """A module that python -m finds in the working directory."""
    (params.parent / "a_worker.py").write_text(WORKER)
    (params.parent / "a_patient_worker.py").write_text(PATIENT)
    yield "a_worker"
    assert list(params.parent.glob(".workers-*")) == []  # whatever happened


@pytest.mark.parametrize("launcher", [[sys.executable], []])
def test_workers_get_the_parameters_and_the_plan(module: str, launcher: list[str]) -> None:
    config = launched(*launcher, data={"train_files": ["x", "y: z"]}, optim={"lr": 0.5})
    plan = {"groups": [[0, 1], [2]]}
    common.run_workers(config, module, plan)
    assert (config_module.load(Path("told.yaml")), json.loads(Path("told.json").read_text())) == (config, plan)


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        (sys.executable, r"a worker failed \(exit status 3\); its message is above"),
        ("no-such-launcher", r"trainer\.launcher: 'no-such-launcher' could not be started \(No such file"),
    ],
)
def test_workers_that_fail_stop_the_stage(module: str, launcher: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        common.run_workers(launched(launcher), module, {"exit": 3})


def test_torchrun_is_this_environments(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            commands.append(command)
            assert env["PYTHONPATH"].split(os.pathsep)[0] == str(common.PROJECT)

        send_signal = signal.raise_signal

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(common.subprocess, "Popen", Process)
    common.run_workers(Config(), module, {})
    common.run_workers(launched("srun", "-n", "4", "python"), module, {})
    assert commands[0][:5] == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    assert commands[1][:4] == ["srun", "-n", "4", "python"]
    for command in commands:
        assert command[-6:-4] == ["-m", module]
        assert command[-4::2] == ["--params", "--worker"]


def test_workers_are_told_to_leave(module: str) -> None:
    """So that they can save before they do."""
    before = signal.getsignal(signal.SIGTERM)

    def terminate() -> None:
        deadline = time.monotonic() + 20
        while not Path("ready").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(SpecError, match="exit status 7"):
        common.run_workers(launched(sys.executable), "a_patient_worker", {})
    thread.join()
    assert Path("saved").read_text() == str(int(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) == before

"""A server process of any kind: vLLM's own is in tests/vllm."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from spec.base import BaseError
from spec.serving import ServingError, server
from spec.serving.server import Server

FOREVER = [sys.executable, "-c", "import time; print('Error: of a worker', flush=True); time.sleep(600)"]


def test_an_interrupt_while_it_starts_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*args: object, **options: object) -> subprocess.Popen[bytes]:
        started.append(real(*args, **options))  # type: ignore[call-overload]
        return started[-1]

    def interrupted(self: Server) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(Server, "_answers", interrupted)
    with pytest.raises(KeyboardInterrupt), Server(FOREVER, tmp_path / "log"):
        pass
    assert started[0].poll() is not None


def test_one_that_does_not_answer_says_what_it_said(tmp_path: Path) -> None:
    with (
        pytest.raises(ServingError, match=r"did not start(.|\n)*Error: of a worker"),
        Server(FOREVER, tmp_path / "log", patience=2),
    ):
        pass


def test_a_base_that_is_gone_is_named_with_the_option_that_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "require_vllm", lambda: None)
    with pytest.raises(BaseError, match=r"--base.*no folder './gone'"):
        server.plain_command("./gone")


def test_it_listens_to_this_machine_alone_unless_told_otherwise(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "require_vllm", lambda: None)
    command = server.plain_command(str(base_folder))
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "--trust-remote-code" not in command
    assert "--trust-remote-code" in server.plain_command(str(base_folder), trust_remote_code=True)


def test_the_mean_acceptance_length_is_vllms() -> None:
    before = {"vllm:spec_decode_num_drafts_total": 10.0, "vllm:spec_decode_num_accepted_tokens_total": 4.0}
    after = {"vllm:spec_decode_num_drafts_total": 30.0, "vllm:spec_decode_num_accepted_tokens_total": 14.0}
    assert server.mean_acceptance_length(before, after) == 1.5
    assert server.mean_acceptance_length({}, {}) == 1.0


def test_without_vllm_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServingError, match="not installed"):
        server.plain_command("models/base")

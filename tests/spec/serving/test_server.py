"""A server process of any kind: vLLM's own is in tests/vllm."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spec import export
from spec.base import BaseError
from spec.config import Decode
from spec.serving import ServingError, server
from spec.serving.server import Server
from tests.spec.export import engines, test_vllm
from tests.spec.heads.reference import config as recurrent

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


def test_it_listens_to_this_machine_alone(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def speculative(command: list[str]) -> dict[str, Any]:
    return json.loads(command[command.index("--speculative-config") + 1])


def test_eagle3_is_vllms_own(
    tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "require_vllm", lambda: None)
    monkeypatch.setattr(server, "installed_vllm", lambda: "0.33.0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    head = test_vllm.checkpoint(tmp_path / "c", test_vllm.config(draft_vocab_size=9))
    command = server.command(tmp_path / "c", Decode(), base=str(base_folder))
    method = speculative(command)
    folder = Path(method.pop("model"))
    assert method == {"method": "eagle3", "num_speculative_tokens": 3}
    assert "--additional-config" not in command
    assert folder.is_relative_to(tmp_path / "cache")
    assert torch.equal(engines.tensors(folder)["fc.weight"], head.fc.weight)
    assert "vLLM 0.33.0: speculators were tested with 0.32.* only" in caplog.messages

    monkeypatch.setattr(export, "write", None)  # nothing is written twice
    again = server.command(tmp_path / "c", Decode(draft="head", draft_len=7), base=str(base_folder))
    assert speculative(again) == {"method": "eagle3", "model": str(folder), "num_speculative_tokens": 7}
    for draft in ("hybrid", "ngram"):
        with pytest.raises(ServingError, match=f"draft {draft} with eagle3: .*cannot mix in n-grams"):
            server.command(tmp_path / "c", Decode(draft=draft), base=str(base_folder))


def test_recurrent_heads_go_to_the_proposer(
    tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "require_vllm", lambda: None)
    engines.checkpoint(tmp_path, recurrent("sum_lstm"))
    command = server.command(tmp_path, Decode(), base=str(base_folder))
    assert speculative(command) == {"method": "custom_class", "model": server.PROPOSER, "num_speculative_tokens": 8}
    assert "sum_lstm drafts through our proposer, on vLLM's deprecated model runner V1" in caplog.text

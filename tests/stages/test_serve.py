"""The command `spec serve`, up to the moment at which vLLM takes over."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from spec.serving import server
from stages import cli
from tests.spec.export import engines, test_vllm
from tests.spec.heads.reference import config


def test_what_is_served_follows_from_the_method(
    tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(server, "require_vllm", lambda: None)
    monkeypatch.setattr(os, "execv", lambda path, command: became.append(command))
    engines.checkpoint(tmp_path / "rnn", config())
    test_vllm.checkpoint(tmp_path / "eagle3", test_vllm.config())

    def serve(name: str, *options: str) -> str:
        arguments = ["serve", "--checkpoint", str(tmp_path / name), "--base", str(base_folder), *options]
        return CliRunner().invoke(cli.main, arguments).output

    serve("rnn")
    assert '"draft": "hybrid"' in " ".join(became.pop())
    serve("eagle3", "--port", "9000")
    command = became.pop()
    assert '"method": "eagle3"' in " ".join(command)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[-2:] == ["--port", "9000"]
    assert "Error: draft hybrid with eagle3" in serve("eagle3", "--draft", "hybrid")
    assert not became

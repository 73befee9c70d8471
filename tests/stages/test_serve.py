"""The command `spec serve`, up to the moment at which vLLM takes over."""

import os
from pathlib import Path

import pytest

from spec.serving import server
from tests.spec.export import engines, test_vllm
from tests.spec.heads.reference import config
from tests.stages.workspace import command


def test_what_is_served_follows_the_method(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(server, "require_vllm", lambda: None)
    monkeypatch.setattr(os, "execv", lambda path, command: became.append(command))
    engines.checkpoint(tmp_path / "rnn", config())
    test_vllm.checkpoint(tmp_path / "eagle3", test_vllm.config())

    def serve(name: str, *options: str, status: int = 0) -> str:
        checkpoint = str(tmp_path / name)
        return command("serve", "--checkpoint", checkpoint, "--base", str(base_folder), *options, status=status)

    serve("rnn")
    assert '"draft": "hybrid"' in " ".join(became.pop())
    serve("eagle3", "--port", "9000")
    began = became.pop()
    assert '"method": "eagle3"' in " ".join(began)
    assert began[began.index("--host") + 1] == "127.0.0.1"
    assert began[-2:] == ["--port", "9000"]
    assert "Error: draft hybrid with eagle3" in serve("eagle3", "--draft", "hybrid", status=1)
    assert not became

"""check says what does not go with a base, fetch says it as well, once it is known in no time."""

import json
from pathlib import Path

import pytest

from spec import base
from spec.base import findings
from tests.stages.workspace import ok, prepare, refused


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepare(tmp_path))
    return tmp_path


def test_a_base_without_remarks(folder: Path) -> None:
    assert ok("check") == f"check: base {folder / 'base'} can be used\n"
    assert not (folder / "data").exists()


@pytest.mark.parametrize("stage", ["check", "fetch"])
def test_what_does_not_go_with_a_base(folder: Path, stage: str) -> None:
    assert "data.max_length is 600 and the base has 512 positions" in ok(stage, "data.max_length=600")
    path = folder / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 288}))
    assert "config.json gives [288, 32]" in refused(stage)


def test_a_turn_whose_end_is_no_stop_is_said_and_is_part_of_what_answers_follow_from(folder: Path) -> None:
    ok("fetch")
    before = json.loads(Path("data/sources.json").read_text())["base"]
    path = folder / "base/tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"'))
    (folder / "base/generation_config.json").write_text('{"eos_token_id": 0}')
    assert "'<|im_end|>' (id 2), at which the base itself does not stop" in ok("fetch")
    after = json.loads(Path("data/sources.json").read_text())["base"]
    assert {key for key in before if before[key] != after[key]} == {"tokenizer", "generation"}
    assert after["generation"] != base.identify(folder / "base")["generation"]  # which stands for the files alone


def test_a_base_that_was_looked_at_is_not_looked_at_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise base.BaseError("looked at again")

    said = ok("fetch", "data.max_length=600")
    monkeypatch.setattr(findings, "examine", refuse)
    assert ok("fetch", "data.max_length=600") == said
    assert "looked at again" in refused("fetch", "data.max_length=700")

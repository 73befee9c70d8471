"""The commands `spec export` and `spec import`."""

from pathlib import Path

import pytest

from spec import files
from tests.spec.export import engines
from tests.spec.heads.reference import config
from tests.stages.workspace import command
from tests.tiny import HIDDEN_SIZE, VOCAB_SIZE


@pytest.fixture
def here(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a speculator of the tiny base."""
    monkeypatch.chdir(tmp_path)
    of_base = {"base_model_name_or_path": str(base_folder), "base_digest": files.digest_json("stands for the base's")}
    c = config(hidden_size=HIDDEN_SIZE, vocab_size=VOCAB_SIZE, **of_base)
    engines.checkpoint(tmp_path / "models/speculator", c)
    return tmp_path


def test_there_and_back(here: Path, base_folder: Path) -> None:
    said = command("export", "--format", "arctic", "--out", "arctic", "--dtype", "float32")
    assert said.startswith("export: sum_rnn with 3 heads as arctic, float32 (")
    assert f"vllm serve {base_folder}" in said
    assert '"model": "arctic"' in said
    assert engines.config_of(here / "arctic")["base_model_archs"] == ["GPT2LMHeadModel"]
    said = command("import", "arctic", "back", "--base", str(base_folder), status=1)
    assert "base_digest" in said  # its weights are others
    assert not Path("back").exists()
    assert "import: sum_rnn with 3 heads" in command("import", "arctic", "back")
    for name in ("pytorch_model.bin", "config.json"):
        assert (here / "back" / name).read_bytes() == (here / "models/speculator" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "--format", "arctic", "--out", "models"], "Error: models holds speculator"),
        (["export", "--format", "arctic", "--out", "e", "--checkpoint", "x"], "x/config.json is missing"),
        (["import", "models/speculator", "back"], "of this project already"),
        (["import", "models/speculator", "models"], "models is not empty"),
    ],
)
def test_refusals_are_one_message(here: Path, arguments: list[str], words: str) -> None:
    assert words in command(*arguments, status=1)
    assert sorted(path.name for path in here.iterdir()) == ["models"]

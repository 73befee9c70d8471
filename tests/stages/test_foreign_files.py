"""Files that this program did not make stay as they are, whatever runs next to them."""

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from spec import files
from stages import common
from stages import run as run_module
from tests.stages.workspace import command, inline_workers, ok, prepare, refused
from tests.workspace import STAGES

FOREIGN = (
    *("notes.txt", ".hidden", "data/notes.txt", "data/tokens/mine.parquet", "data/responses/notes.txt"),
    *("data/features/notes.txt", "data/prompts/mine.parquet", "models/mine/model.safetensors"),
    *("models/speculator/notes", "models/speculator/last/notes", "results/notes.txt", "results/train/notes.txt"),
    *("results/train/mine.csv", "results/evaluate/notes.txt", "checkpoints/mine/global_step_7/model.bin"),
    *("checkpoints/global_step_5/model.bin", "global_step_100/model.pt", ".mine.partial-not", "store/notes.txt"),
    *("store/roots/notes.txt", "store/features-mine/notes.txt"),
)


def plant(root: Path, *names: str) -> dict[str, str]:
    """Foreign files, and what they hold."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"somebody's own {name}")
    return texts(root, names)


def texts(root: Path, names: Iterable[str] = FOREIGN) -> dict[str, str]:
    return {name: (root / name).read_text() for name in names if (root / name).is_file()}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("foreign"))


def test_every_stage_leaves_them_alone(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plant(ready, *FOREIGN)
    monkeypatch.chdir(ready)
    inline_workers(monkeypatch)
    for _ in range(2):  # the second time there are outputs of the first
        for stage in STAGES:
            ok(stage)
            assert texts(ready) == before, stage
    ok("train", "trainer.total_epochs=1")
    for arguments in (["info"], ["verify"], ["gc", "--older-than", "0"]):
        command("store", *arguments)
        assert texts(ready) == before, arguments
    files.remove(common.TRAINED_BASE)
    before = plant(common.TRAINED_BASE, "model.safetensors")
    assert "models/trained_base holds something that this stage has not written" in refused("train")
    assert texts(common.TRAINED_BASE, before) == before
    files.remove(common.TRAINED_BASE)


@pytest.fixture
def stubbed(ready: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The script's stages, as quick as can be: each says its name, and train leaves what it leaves."""
    called: list[str] = []

    def stage(command: list[str], cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        name = command[-1].removeprefix("stages.")
        called.append(name)
        if name == "train":
            for folder in (common.MODEL, f"checkpoints/abc/global_step_{len(called)}"):
                for file in ("pytorch_model.bin", "config.json"):
                    (cwd / folder).mkdir(parents=True, exist_ok=True)
                    (cwd / folder / file).write_text(f"of call {len(called)}")
            files.write_json(cwd / "results/train/details.json", {"checkpoints": "checkpoints/abc"})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run_module.subprocess, "run", stage)
    monkeypatch.chdir(ready)
    return called


def call(folder: Path) -> Result:
    data = [f"data.{split}_files={Path.cwd()}/prompts/{split}.parquet" for split in common.SPLITS]
    return CliRunner().invoke(run_module.run, ["--nproc-per-node", "1", "--save-path", str(folder), "--", *data])


@pytest.mark.parametrize(
    "name",
    [
        *("data/notes.txt", "results/notes.txt", "models/speculator/notes", "models/trained_base/model.safetensors"),
        *("checkpoints/mine/model.bin", "global_step_100/model.pt", "params.yaml", "config.json", "pytorch_model.bin"),
    ],
)
def test_the_script_refuses_a_folder_with_something_in_the_way(name: str, tmp_path: Path, stubbed: list[str]) -> None:
    before = plant(tmp_path, name)
    result = call(tmp_path)
    assert result.exit_code == 1
    parts = Path(name).parts
    assert f"holds {'/'.join(parts[:2] if parts[0] == 'models' else parts[:1])}" in result.output
    assert not stubbed
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [name]
    assert texts(tmp_path, before) == before


def test_the_script_replaces_what_an_earlier_call_has_made_and_nothing_else(tmp_path: Path, stubbed: list[str]) -> None:
    before = plant(tmp_path, "notes.txt", "models/mine/model.safetensors")
    assert call(tmp_path).exit_code == 0
    assert (tmp_path / "global_step_5").is_dir()
    first = (tmp_path / "pytorch_model.bin").read_text()
    # What a user puts into its folders later stays, too.
    inside = ("data/mine.parquet", "results/notes.txt", "models/speculator/notes", "global_step_5/notes")
    inside += ("checkpoints/mine/global_step_7/model.bin", "checkpoints/.DS_Store")
    before |= plant(tmp_path, *inside)
    result = call(tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "pytorch_model.bin").read_text() != first
    assert (tmp_path / "global_step_11/pytorch_model.bin").is_file()
    assert [path.name for path in (tmp_path / "global_step_5").iterdir()] == ["notes"]
    assert texts(tmp_path, before) == before
    plant(tmp_path, "global_step_100/model.pt")  # verl's, after our calls
    assert "holds global_step_100" in call(tmp_path).output

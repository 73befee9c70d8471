"""dvc.yaml names all code that decides what a stage writes: else a fix would leave stale results."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.workspace import REPOSITORY, STAGES

NO_DEPENDENCY = (
    "spec/__init__.py",
    "spec/errors.py",
    "spec/lineage.py",  # what MLflow is told
    "spec/plots.py",
    "spec/record.py",  # what MLflow is told
    "spec/store/__init__.py",
    "spec/store/locks.py",
    "spec/store/upkeep.py",  # who uses which segments
    "spec/tracking.py",
    "spec/training/__init__.py",
    "stages/__init__.py",
    "stages/common.py",  # options, progress, launching workers
)
"""What decides nothing that a stage writes."""
HELPERS = ("stages/__init__.py", "stages/common.py", "stages/embedded.py")


def imported(path: Path) -> Iterator[Path]:
    """The project's own files that a file imports, those within functions, too."""
    for node in ast.walk(ast.parse((REPOSITORY / path).read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.partition(".")[0] in ("spec", "stages"):
                stem = Path(*name.split("."))
                found = (stem.with_suffix(".py"), stem / "__init__.py")
                yield from (each for each in found if (REPOSITORY / each).is_file())


def needed(stage: str) -> set[str]:
    """Everything that a stage's code reaches."""
    waiting, seen = [Path(f"stages/{stage}.py")], set()
    while waiting:
        path = waiting.pop()
        if str(path) not in seen and str(path) not in NO_DEPENDENCY:
            seen.add(str(path))
            waiting += imported(path)
    return seen


@pytest.mark.parametrize("stage", STAGES[1:])  # fetch runs every time
def test_a_stage_depends_on_all_code_that_decides_what_it_writes(stage: str) -> None:
    named = [Path(each) for each in YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"][stage]["deps"]]
    missing = {path for path in needed(stage) if not any(each in (Path(path), *Path(path).parents) for each in named)}
    assert not missing, f"dvc.yaml, {stage}: deps lack {', '.join(sorted(missing))}"


def test_imports_are_followed() -> None:
    assert "spec/training/loss.py" in needed("train")
    assert "spec/kv_cache.py" in needed("respond")
    assert "spec/tracking.py" not in needed("train")


@pytest.mark.parametrize("path", [*(REPOSITORY / "stages").glob("*.py")], ids=lambda path: path.stem)
def test_a_stage_imports_no_other_stage(path: Path) -> None:
    if path.stem != "cli":
        found = {str(each) for each in imported(path.relative_to(REPOSITORY)) if each.parts[0] == "stages"}
        assert found <= set(HELPERS)

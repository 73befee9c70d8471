"""A folder in which stages run, without a process of its own for each of them."""

import importlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from spec import config as config_module
from spec.config import Config
from stages import cli, common
from tests.tiny import make_base, write_prompts
from tests.workspace import STAGES

SMALL: dict[str, Any] = {
    "data": {"max_length": 96, "train_batch_size": 4, "micro_batch_size_per_gpu": 2},
    "model": {"dtype": "float32", "speculator": {"n_predict": 3, "inner_dim": 24, "emb_dim": 24, "proj_dim": 24}},
    "respond": {"max_new_tokens": 12, "batch_size": 8},
    "features": {"segment_tokens": 256},
    "optim": {"lr": 0.01},
    "trainer": {"logger": "console", "total_epochs": 2},
    "evaluate": {"max_prompts": 2, "max_new_tokens": 8},
}


def prepare(root: Path, changed: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """A base, prompts and params.yaml whose paths are absolute; the store is the folder's own."""
    make_base(root / "base")
    write_prompts(root / "prompts")
    paths = {f"{split}_files": str(root / f"prompts/{split}.parquet") for split in common.SPLITS}
    values = {**SMALL, **{name: {**SMALL.get(name, {}), **section} for name, section in (changed or {}).items()}}
    values["data"] = {**values["data"], **paths}
    values["model"] = {**values["model"], "partial_pretrain": str(root / "base")}
    values["features"] = {**values["features"], "store": str(root / "store")}
    config_module.save(config_module.from_mapping(values), root / "params.yaml")
    return root


def copy_of(ready: Path, folder: Path) -> Path:
    """Parameters and data of a folder in which stages have run; base, prompts and store stay that folder's."""
    folder.mkdir(exist_ok=True)
    shutil.copy(ready / "params.yaml", folder)
    shutil.copytree(ready / "data", folder / "data")
    return folder


def command(*arguments: str, status: int = 0) -> str:
    """Run `spec ARGUMENTS` in this process and in this folder, which must end with this status; what it said."""
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == status, (result.output, result.exc_info)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.output


def ok(name: str, *overrides: str, status: int = 0) -> str:
    """Run a stage that must do its work; what it said."""
    return command(name, *(part for override in overrides for part in ("-S", override)), status=status)


def run_through(root: Path, last: str, *overrides: str) -> str:
    """Run the stages up to one in a folder, their workers in this process; what the last one said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        inline_workers(patch)
        return [ok(name, *overrides) for name in STAGES[: STAGES.index(last) + 1]][-1]


def refused(name: str, *overrides: str) -> str:
    """Run a stage that must fail; its message."""
    return ok(name, *overrides, status=1)


def inline_workers(patch: pytest.MonkeyPatch) -> None:
    """Let workers be this process: what they run is the same, and they start at once."""

    def run_workers(config: Config, module: str, plan: Sequence[Any]) -> None:
        params, path = Path(".inline-params.yaml"), Path(".inline-plan.json")
        config_module.save(config, params)
        path.write_text(json.dumps(plan))
        command = getattr(importlib.import_module(module), module.rpartition(".")[2])
        try:
            command.main(["--params", str(params), "--worker", str(path)], standalone_mode=False)
        finally:
            params.unlink()
            path.unlink()

    patch.setattr(common, "run_workers", run_workers)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

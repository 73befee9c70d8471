"""run: every stage in a folder of its own, from the guide's defaults; what run_speculator_training.sh calls."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pyarrow.parquet as pq

from spec import config as config_module
from spec import corpus, files, heads
from spec.config import Config
from spec.errors import SpecError
from stages import common, embedded

_STAGES = ("fetch", "tokenize", "respond", "cache", "train", "evaluate")
_MARK = ".run_speculator_training.json"
"""In SAVE_PATH: names what calls of this command have made there. Nothing else is removed or replaced."""

_MADE = (
    *("data", "results", str(common.MODEL), str(common.TRAINED_BASE), "checkpoints", "params.yaml"),
    *(heads.WEIGHTS, heads.CONFIG),
)
"""What every call makes. Stages replace their own files in the folders, and leave others alone."""


@click.command()
@click.option("--nproc-per-node", type=click.IntRange(min=1), required=True, help="Workers on this machine.")
@click.option("--save-path", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def run(nproc_per_node: int, save_path: Path, overrides: tuple[str, ...]) -> None:
    """Run every stage with the defaults of VERL's speculator guide, and leave the checkpoint in SAVE_PATH.

    An earlier call leaves two things to this one: the answers and hidden states in the store, which are never computed
    twice, and the checkpoints of an interrupted call with the same parameters. The data defaults to $HOME/data/gsm8k
    (as the guide's example prepares it) if that exists, else to the embedded prompts.
    """
    with common.clear_errors():
        config = _config(nproc_per_node, overrides)
        owned = _claim(save_path)
        (save_path / "data").mkdir(exist_ok=True)
        defaults = Config().data
        if config.data.eval_files == defaults.eval_files and config.data.val_files != defaults.val_files:
            config = _halve_val(config, save_path / "data")
        config_module.save(config, save_path / "params.yaml")
    environment = common.child_environment()
    for stage in _STAGES:
        status = subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=save_path, env=environment).returncode
        if status:
            sys.exit(status)
    with common.clear_errors():
        _deliver(save_path, owned)
    common.say(f"run: the speculator is in {save_path} (pytorch_model.bin, config.json, global_step_*)")


def _claim(save_path: Path) -> list[str]:
    """Write down what this call will make in SAVE_PATH, and return what earlier calls have made there; a SpecError
    names what is in the way and was made by no call."""
    mark = save_path / _MARK
    owned: list[str] = files.read_json(mark) if mark.is_file() else []
    steps = sorted(path.name for path in save_path.glob("global_step_*"))
    in_the_way = [name for name in (*_MADE, *steps) if os.path.lexists(save_path / name) and name not in owned]
    if in_the_way:
        raise SpecError(
            f"{save_path} holds {', '.join(in_the_way)}, which no earlier call of this command has made; name a folder "
            "of its own"
        )
    files.write_json(mark, sorted({*_MADE, *owned}))
    return owned


def _deliver(save_path: Path, owned: list[str]) -> None:
    """Bring the speculator and the steps that it was saved at to where the guide has them."""
    for name in (heads.WEIGHTS, heads.CONFIG):
        with files.whole(save_path / name) as copy:
            shutil.copyfile(save_path / common.MODEL / name, copy)
    saved = save_path / files.read_json(save_path / "results/train" / common.DETAILS)["checkpoints"]
    steps = sorted(saved.glob("global_step_*"))
    for earlier in (save_path / name for name in owned if name.startswith("global_step_")):
        for name in (heads.WEIGHTS, heads.CONFIG):
            files.remove(earlier / name)
        with contextlib.suppress(OSError):  # a user's own files stay there
            earlier.rmdir()
    files.write_json(save_path / _MARK, sorted({*_MADE, *(step.name for step in steps)}))
    for step in steps:
        files.move(step, save_path / step.name)
    with contextlib.suppress(OSError):
        saved.rmdir()


def _config(nproc_per_node: int, overrides: tuple[str, ...]) -> Config:
    """The guide's defaults with the caller's overrides; relative paths are the caller's, not the save path's."""
    gsm8k = Path(os.path.expandvars("$HOME/data/gsm8k"))
    defaults = [f"trainer.launcher=torchrun --standalone --nproc-per-node={nproc_per_node}"]
    if all((gsm8k / name).is_file() for name in ("train.parquet", "test.parquet")):
        defaults += [f"data.train_files={gsm8k}/train.parquet", f"data.val_files={gsm8k}/test.parquet"]
        common.say(f"run: data defaults to {gsm8k}")
    tree = config_module.from_mapping({}, overrides=[*defaults, *overrides]).model_dump(mode="json")
    for split in common.SPLITS:
        tree["data"][f"{split}_files"] = [_absolute(path) for path in tree["data"][f"{split}_files"]]
    tree["model"]["partial_pretrain"] = _absolute(tree["model"]["partial_pretrain"])
    return config_module.from_mapping(tree)


def _halve_val(config: Config, folder: Path) -> Config:
    """Split the caller's own val files: even rows choose the checkpoint, odd rows are reported."""
    halves: dict[str, list[str]] = {"val": [], "eval": []}
    for number, path in enumerate(corpus.list_files(config.data.val_files, split="val")):
        table = pq.read_table(path)
        if len(table) < 2:
            raise SpecError(f"{path} has {len(table)} rows; give data.eval_files, or val files of two rows and more")
        for first, (split, half) in enumerate(halves.items()):
            target = folder / split / f"{number}-{path.name}"
            target.parent.mkdir(exist_ok=True)
            pq.write_table(table.take(list(range(first, len(table), 2))), target)
            half.append(str(target.relative_to(folder.parent)))
    common.say(
        "run: no data.eval_files given, so even rows of data.val_files choose the checkpoint, odd ones are reported"
    )
    tree = config.model_dump(mode="json")
    tree["data"] |= {f"{split}_files": files for split, files in halves.items()}
    return config_module.from_mapping(tree)


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() and not embedded.is_embedded(path) else path


if __name__ == "__main__":
    run()

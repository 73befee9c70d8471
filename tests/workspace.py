"""A copy of the project with a tiny base and tiny data, run by dvc."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.tiny import make_base, write_prompts

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = ["fetch", "tokenize", "respond", "cache", "train", "evaluate"]

PARAMS = {
    "data": {"max_length": 96, "max_samples": None, "train_batch_size": 4, "micro_batch_size_per_gpu": 2},
    "model": {"dtype": "float32"},
    "respond": {"max_new_tokens": 16, "batch_size": 4},
    "features": {"segment_tokens": 128},
    "trainer": {"launcher": "torchrun --standalone --nproc-per-node=2", "total_epochs": 2, "test_freq": 3},
    "evaluate": {"max_prompts": 3, "max_new_tokens": 12},
}
SPECULATOR = {"n_predict": 3, **dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), 24), "init": "random"}
SPECULATOR |= {"draft_vocab_size": None}


def environment(root: Path) -> dict[str, str]:
    """This interpreter's commands first, a cache in the folder, and no way out."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = {**os.environ, "PATH": path, "XDG_CACHE_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1"}
    found.pop("MLFLOW_TRACKING_URI", None)
    return found | {"DVC_NO_ANALYTICS": "1"}


class Workspace:
    """Runs commands in such a copy."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = environment(root)

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    def repro(self) -> list[str]:
        return re.findall(r"^Running stage '(\w+)'", self.run("dvc", "repro").stdout, re.M)

    def set(self, **values: object) -> None:
        """Change parameters: section__key=value."""
        path = self.root / "params.yaml"
        yaml = YAML()
        tree = yaml.load(path.read_text())
        for key, value in values.items():
            *sections, name = key.split("__")
            node = tree
            for section in sections:
                node = node[section]
            node[name] = value
        with path.open("w") as file:
            yaml.dump(tree, file)

    def json(self, path: str) -> Any:
        return json.loads((self.root / path).read_text())


def make_workspace(root: Path) -> Workspace:
    """A workspace that is ready for dvc; the project's own store is not touched."""
    for name in ("spec", "stages"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
        shutil.copy(REPOSITORY / name, root / name)
    shutil.copytree(REPOSITORY / "data/embedded", root / "data/embedded", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "data/corpus.lock", root / "data/corpus.lock")
    make_base(root / "base", family="qwen2")
    write_prompts(root / "prompts")
    space = Workspace(root)
    space.set(
        model__partial_pretrain=str(root / "base"),
        **{f"data__{split}_files": str(root / f"prompts/{split}.parquet") for split in ("train", "val", "eval")},
        **{f"{section}__{key}": value for section, values in PARAMS.items() for key, value in values.items()},
        **{f"model__speculator__{key}": value for key, value in SPECULATOR.items()},
    )
    return space

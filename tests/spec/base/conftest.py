"""Tiny bases of two kinds, and one that may be spoilt."""

import shutil
from pathlib import Path

import pytest
import torch

from spec.base import Base, load
from spec.config import Model
from tests.tiny import make_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bases(base: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """Positions that are learned, and positions that are rotations."""
    folder = make_base(tmp_path_factory.mktemp("bases") / "qwen2", "qwen2")
    return {"gpt2": base, "qwen2": load(Model(), folder, "digest", CPU, dtype="float32")}


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base to be spoilt."""
    return shutil.copytree(base_folder, tmp_path / "model")

"""respond.engine=vllm: the stage as it is run, with two workers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from spec import corpus
from spec.config import Model
from spec.serving.answering import Engine
from tests.vllm.small import OVERRIDES, Trained, run

TWO_WORKERS = 'trainer.launcher="torchrun --standalone --nproc-per-node=2"'
ENGINE = (*OVERRIDES, "respond.engine=vllm", "respond.batch_size=32", TWO_WORKERS)


def workspace(trained: Trained, root: Path) -> Path:
    """A folder in which tokenize has run."""
    shutil.copytree(trained.root / "data", root / "data", ignore=shutil.ignore_patterns("responses", "features"))
    shutil.copy(trained.root / "params.yaml", root)
    (root / "models").mkdir()
    (root / "models/base").symlink_to((trained.root / "models/base").resolve())
    return root


def test_vllm_writes_what_transformers_writes_and_writes_nothing_twice(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of each worker: more threads than cores wait for each other
    root = workspace(trained, tmp_path)
    run(root, "respond", *ENGINE)
    pairs = []
    for split in ("train", "val", "eval"):
        theirs, ours = (corpus.read(folder / f"data/responses/{split}.parquet") for folder in (root, trained.root))
        pairs += [(a.ids.tolist(), b.ids.tolist()) for a, b in zip(theirs, ours, strict=True)]
    parted = sum(a != b for a, b in pairs)
    assert len(pairs) > 100
    assert parted <= len(pairs) // 50  # float32; the two round differently, and a near tie may fall the other way
    again = run(root, "respond", *ENGINE)
    assert f"respond: 0 of {len(pairs)} answers" in again


def test_sampled_answers_follow_from_prompt_and_seed(trained: Trained) -> None:
    engine = Engine(Model(dtype="float32"), trained.root / "models/base", 512)
    prompts, seeds = trained.prompts[:6], [7, 7, 8, 9, 10, 11]

    def sample(rows: list[int]) -> list[list[int]]:
        written: list[int] = []
        found = engine.answer([prompts[r] for r in rows], 12, 1.0, [seeds[r] for r in rows], written.append)
        assert sum(written) == sum(map(len, found))
        return found

    together = sample([0, 1, 2, 3, 4, 5])
    assert sample([5, 0]) == [together[5], together[0]]
    assert engine.answer(prompts[:1], 12, 1.0, [8], print) != together[:1]

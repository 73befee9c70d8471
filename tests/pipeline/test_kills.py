"""Whatever is killed, and whenever: the same commands again end as if nothing had been."""

import os
import random
from pathlib import Path
from typing import Any

import pytest

from spec import config as config_module
from spec import corpus, files
from spec.heads import LAST
from spec.store.manifest import Manifest
from spec.store.reader import FeatureReader
from stages import common
from tests.pipeline import killer
from tests.spec.store.producer import serving
from tests.stages.test_foreign_files import plant, texts
from tests.stages.workspace import prepare
from tests.workspace import STAGES

KILLS = int(os.environ.get("KILLS", "60"))
"""In all; 200 of them take about ten minutes."""

A_STAGE = 7
"""Kills of one stage, at most, before it may end."""


def outcome(root: Path) -> dict[str, Any]:
    """Answers, states, weights and the walk."""
    config = config_module.load(root / "params.yaml")
    found: dict[str, Any] = {"weights": files.digest_file(root / common.MODEL / "pytorch_model.bin")}
    metrics = files.read_json(root / "results/evaluate/details.json")
    found |= {name: metrics[name] for name in ("offline", "ngram", "lookup", "hybrid", "repetition")}
    for split in common.SPLITS:
        rows = corpus.read(root / common.responses_path(split))
        found[f"answers of {split}"] = [(row.ids.tolist(), row.mask.tolist(), row.domain) for row in rows]
        reader = FeatureReader(Manifest.load(root / common.features_path(split)), Path(config.features.store or ""))
        found[f"states of {split}"] = [reader.packed([number]).states[LAST].tolist() for number in range(len(reader))]
    return found


@pytest.mark.slow
def test_kills_at_random_moments_of_all_stages_change_nothing(tmp_path: Path) -> None:
    """Everything is made anew in each round, next to files that are none of the program's."""
    generator, killed, rounds = random.Random(0), dict.fromkeys(STAGES, 0), 0
    changed = {"trainer": {"save_freq": 2, "test_freq": 4}}
    with serving(killer.__name__) as run:
        calm = prepare(tmp_path / "calm", changed)
        seconds = {}
        for stage in STAGES:
            done = run(folder=str(calm), stage=stage)
            assert done["status"] == 0, (calm / ".log-of-stages").read_text()
            seconds[stage] = done["seconds"]
        # fetch remembers what it has seen of a base: a later round takes as long as a second call
        seconds["fetch"] = run(folder=str(calm), stage="fetch")["seconds"]
        expected = outcome(calm)
        while sum(killed.values()) < KILLS:
            rounds += 1
            root = prepare(tmp_path / f"round-{rounds}", changed)
            foreign = plant(root)
            for stage in STAGES:
                for _ in range(A_STAGE):
                    done = run(folder=str(root), stage=stage, delay=generator.uniform(0, 0.7 * seconds[stage]))
                    if done["status"] == 0:
                        break
                    assert done["status"] == -9, (root / ".log-of-stages").read_text()
                    killed[stage] += 1
                else:
                    assert run(folder=str(root), stage=stage)["status"] == 0, (root / ".log-of-stages").read_text()
            assert outcome(root) == expected
            assert texts(root) == foreign
    print(f"{sum(killed.values())} kills in {rounds} rounds: {killed}")
    assert min(killed.values()) > 0

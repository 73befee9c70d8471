"""evaluate: the walk beside the real loop, and what the report says of them."""

import csv
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Mamba2Config

from spec import files
from stages import evaluate
from tests.stages.workspace import prepare, run_through
from tests.tiny import VOCAB_SIZE


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which everything has run in float32, and what evaluate said."""
    root = prepare(tmp_path_factory.mktemp("evaluated"), {"evaluate": {"max_prompts": 6, "max_new_tokens": 8}})
    return root, run_through(root, "evaluate")


@pytest.fixture
def metrics(evaluated: tuple[Path, str]) -> Any:
    return files.read_json(evaluated[0] / "results/evaluate/details.json")


def test_the_loop_takes_the_steps_of_the_walk(metrics: Any) -> None:
    """Answers of 12 tokens are stored and 8 are decoded: the walk is cut to them."""
    decode = metrics["decode"]
    assert decode["prompts"] == 6
    for row in (*decode["sources"].values(), *metrics["domains"].values()):
        assert row["decode_tokens_per_step"] == row["walk_tokens_per_step"]
    assert decode["speedup"] == decode["sources"]["hybrid"]["speedup"] > 0
    assert max(row["decode_tokens_per_step"] for row in decode["sources"].values()) > 1


def test_figures_of_a_source_agree(metrics: Any) -> None:
    for source in ("offline", "ngram", "lookup", "hybrid"):
        row = metrics[source]
        joint, low, high = [1.0, *row["acceptance"].values()], row["tokens_per_step_low"], row["tokens_per_step_high"]
        assert row["tokens_per_step"] == pytest.approx(sum(joint))
        assert low <= row["tokens_per_step"] <= high
        assert sum(row["histogram"].values()) == pytest.approx(1)
        mean = sum(int(k) * share for k, share in row["histogram"].items())
        assert row["tokens_per_step"] == pytest.approx(1 + mean)
        for i, share in enumerate(row["conditional"].values(), 1):
            assert share * joint[i - 1] == pytest.approx(joint[i])
        assert list(row["sampling"]) == ["0.6", "1.0"]
        for sampled in row["sampling"].values():
            assert sampled["tokens_per_step"] >= 1
            assert all(0 <= share <= 1 for share in sampled["conditional"].values())
    gain = metrics["gain"]
    assert gain["value"] == pytest.approx(metrics["hybrid"]["tokens_per_step"] - metrics["lookup"]["tokens_per_step"])
    assert gain["low"] <= gain["value"] <= gain["high"]


def test_tables_and_pictures(evaluated: tuple[Path, str], metrics: Any) -> None:
    folder = evaluated[0] / "results/evaluate"
    with (folder / "draft_length.csv").open() as file:
        rows = list(csv.DictReader(file))
    head = [float(row["tokens_per_step"]) for row in rows if row["source"] == "head"]
    assert head == sorted(head)
    assert head[-1] == metrics["offline"]["tokens_per_step"]
    assert [int(row["draft_len"]) for row in rows if row["source"] == "hybrid"] == list(range(1, 13))
    assert all((folder / f"{name}.png").stat().st_size > 5000 for name in ("acceptance", "domains", "draft_length"))


@pytest.mark.parametrize("low", [-0.1, 0.0, 0.1])
def test_heads_that_add_nothing_are_warned_of(metrics: Any, low: float) -> None:
    for row in (metrics, *metrics["domains"].values()):
        row["gain"] = {"value": 0.2, "low": 0.1, "high": 0.3}
    metrics["domains"]["code"]["gain"]["low"] = low
    warned = [line for line in evaluate._report(metrics, metrics["domains"]) if line.startswith("warning")]
    assert len(warned) == (low <= 0)
    assert all("not certain" in line and " in code:" in line for line in warned)


def test_the_report_has_a_row_a_domain(evaluated: tuple[Path, str]) -> None:
    rows = [line.split() for line in evaluated[1].partition("\ndomain ")[2].splitlines()[1:5]]
    assert [(row[0], len(row)) for row in rows] == [(name, 9) for name in ("chat", "code", "maths", "all")]


def test_a_base_that_cannot_take_drafts_back_is_walked_and_decoded_without_them(tmp_path: Path) -> None:
    root = prepare(tmp_path)
    shape = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16, "num_hidden_layers": 2}
    config = Mamba2Config(vocab_size=VOCAB_SIZE, hidden_size=32, eos_token_id=2, initializer_range=0.4, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "base")
    said = run_through(root, "evaluate", "optim.loss=kl", "respond.max_new_tokens=12")
    assert "only plain decoding was measured" in said
    metrics = files.read_json(root / "results/evaluate/details.json")
    assert metrics["decode"]["tokens_per_second"].keys() == {"none"}
    assert metrics["decode"]["lossless"] is None
    assert not {"speedup", "tokens_per_step"} & metrics["decode"].keys()
    assert metrics["offline"]["tokens_per_step"] >= 1
    assert 0 <= metrics["cut"] <= 1

"""The whole DAG under dvc, on a tiny model of another family, with two workers wherever several can work."""

import re
import sqlite3

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.workspace import STAGES, Workspace, make_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    space = make_workspace(tmp_path_factory.mktemp("workspace"))
    space.run("dvc", "init", "--no-scm", "--quiet")
    assert space.repro() == STAGES
    return space


def test_outputs(workspace: Workspace) -> None:
    metrics = workspace.json("results/evaluate/details.json")
    for name in ("acceptance", "accuracy"):
        assert list(metrics["offline"][name]) == ["1", "2", "3"]
    assert (metrics["offline"]["written_by_base"], metrics["decode"]["lossless"]) == (1, True)
    assert metrics["decode"]["walk_tokens_per_step"] == metrics["decode"]["tokens_per_step"]
    for row in metrics["domains"].values():
        assert {"tokens_per_step", "ngram_tokens_per_step", "tokens_per_step_nonlooping"} <= set(row)
    for name in ("pytorch_model.bin", "config.json"):
        assert (workspace.root / "models/speculator" / name).is_file()
    for name in ("train/loss.png", "evaluate/acceptance.png", "evaluate/domains.png", "evaluate/draft_length.png"):
        assert (workspace.root / "results" / name).stat().st_size > 5000


def test_dvc_shows_a_dozen_figures_with_short_names(workspace: Workspace) -> None:
    found = [workspace.json(f"results/{stage}/metrics.json") for stage in ("cache", "train", "evaluate")]
    names = [name for figures in found for name in figures]
    assert {"head", "ngram", "hybrid", "x_plain", "lossless", "val", "bytes_pos"} <= set(names)
    assert len(names) == len(set(names)) <= 12
    assert max(map(len, names)) <= 12
    shown = workspace.run("dvc", "metrics", "show").stdout
    assert max(map(len, shown.splitlines())) <= 160


def test_mlflow_has_the_run(workspace: Workspace) -> None:
    run = workspace.json("models/speculator/mlflow_run.json")["run_id"]
    with sqlite3.connect(workspace.root / "mlflow.db") as database:
        params = dict(database.execute("select key, value from params where run_uuid = ?", [run]))
        tags = dict(database.execute("select key, value from tags where run_uuid = ?", [run]))
        curves = database.execute("select count(*) from metrics where run_uuid = ? and key = 'curves/loss'", [run])
        assert curves.fetchone()[0] > 1
        headline = database.execute("select value from metrics where run_uuid = ? and key = 'x_plain'", [run])
        assert headline.fetchone()[0] > 0
        child = database.execute("select run_uuid from tags where key = 'mlflow.parentRunId' and value = ?", [run])
        assert child.fetchone() is not None
    assert params["model.speculator.n_predict"] == "3"
    assert len(tags["features"]) == 64
    assert list((workspace.root / "mlartifacts").rglob("loss.png"))
    assert list((workspace.root / "mlartifacts").rglob("pytorch_model.bin"))


def test_generate_writes_what_plain_decoding_writes(workspace: Workspace) -> None:
    command = ["python", "-m", "stages.cli", "generate", "--prompt", "what is two plus two", "--dtype", "float32"]
    texts = {
        draft: workspace.run(*command, "--max-new-tokens", "24", "--draft", draft).stdout
        for draft in ("none", "head", "hybrid")
    }
    assert texts["none"].strip()
    assert texts["head"] == texts["none"] == texts["hybrid"]


def test_only_what_changed_runs_again(workspace: Workspace) -> None:
    assert workspace.repro() == ["fetch"]
    workspace.set(trainer__launcher="torchrun --standalone --nproc-per-node=1")
    assert workspace.repro() == ["fetch"]
    workspace.set(evaluate__max_prompts=2)
    assert workspace.repro() == ["fetch", "evaluate"]
    workspace.set(model__speculator__n_predict=4)
    assert workspace.repro() == ["fetch", "cache", "train", "evaluate"]


def test_a_longer_training_file_costs_only_its_new_rows(workspace: Workspace) -> None:
    path = workspace.root / "prompts/train.parquet"
    table = pq.read_table(path)
    new = table.slice(0, 2).to_pylist()
    for number, row in enumerate(new):
        row["question"] = f"a new question number {number}"
    pq.write_table(pa.concat_tables([table, pa.Table.from_pylist(new, schema=table.schema)]), path)
    done = workspace.run("dvc", "repro")
    assert re.findall(r"^Running stage '(\w+)'", done.stdout, re.M) == STAGES
    assert re.search(r"respond: 2 of \d+ answers are to be written", done.stdout), done.stdout
    assert re.search(r"cache: 2 of \d+ sequences", done.stdout), done.stdout

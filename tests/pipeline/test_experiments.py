"""dvc experiments over one store: nothing is computed twice, and the store does not grow."""

import json
import re
from pathlib import Path

import pytest

from tests.workspace import STAGES, Workspace, make_workspace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A git repository in which the pipeline has run once and its lock file is committed."""
    space = make_workspace(tmp_path_factory.mktemp("repository"))
    ignored = "/base\n/cache\n/prompts\n__pycache__/\nmlflow.db\nmlartifacts/\ncheckpoints/\n"
    (space.root / ".gitignore").write_text(ignored)
    space.run("git", "init", "--quiet")
    space.run("git", "config", "user.email", "tests@example.org")
    space.run("git", "config", "user.name", "tests")
    space.run("dvc", "init", "--quiet")
    assert space.repro() == STAGES
    space.run("git", "add", "--all")
    space.run("git", "commit", "--quiet", "--message", "first run")
    return space


def stored(space: Workspace) -> set[Path]:
    """Every file of the store's segments."""
    store = space.root / "cache/speculator-training/store"
    return {path for path in store.rglob("*") if path.is_file() and path.parent.name != "roots"}


def test_a_temporary_experiment_recomputes_nothing(repository: Workspace) -> None:
    before = stored(repository)
    done = repository.run("dvc", "exp", "run", "--temp", "--name", "two", "-S", "model.speculator.n_predict=2")
    ran = re.findall(r"^Running stage '(\w+)'", done.stdout, re.M)
    assert ran == ["fetch", "cache", "train", "evaluate"], done.stdout
    assert "cache: 0 of " in done.stdout
    assert stored(repository) == before


def test_queued_experiments_recompute_nothing(repository: Workspace) -> None:
    before = stored(repository)
    repository.run("dvc", "exp", "run", "--queue", "-S", "model.speculator.n_predict=2,3", "-S", "optim.lr=0.003")
    repository.run("dvc", "exp", "run", "--queue", "-S", "model.speculator.method=sum_lstm")
    repository.run("dvc", "exp", "run", "--run-all")
    assert stored(repository) == before
    rows = json.loads(repository.run("dvc", "exp", "show", "--json").stdout)
    experiments = [found for row in rows for found in row.get("experiments") or []]
    assert len(experiments) >= 3
    for experiment in experiments:
        metrics = experiment["revs"][0]["data"]["metrics"]["results/evaluate/metrics.json"]["data"]
        assert metrics["head"] >= 1


def test_the_table_of_experiments_fits_a_screen(repository: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(repository.environment, "COLUMNS", "160")
    command = ("dvc", "exp", "show", "--only-changed", "--drop", "^(data|models|spec|stages)/", "--no-pager")
    lines = repository.run(*command).stdout.splitlines()
    (header,) = (line for line in lines if "Experiment" in line)
    assert {"seconds", "x_plain", "model.speculator.n_predict", "optim.lr"} <= set(header.split())
    assert max(map(len, lines)) <= 160


def test_an_applied_experiment_recomputes_nothing(repository: Workspace) -> None:
    repository.run("dvc", "exp", "apply", "two")
    assert repository.repro() == ["fetch"]
    assert repository.json("models/speculator/config.json")["n_predict"] == 2

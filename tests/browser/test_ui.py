"""A whole run as a person sees it: Chromium against `make ui`. `make test-ui` runs this."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spec import files
from spec.record import RUN_FILE, Record
from stages import common
from tests.mlflow_server import Server
from tests.stages.workspace import inline_workers, ok, prepare
from tests.workspace import REPOSITORY

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed; `make test-ui` installs it", exc_type=ImportError
)

SCREENSHOTS = REPOSITORY / "build/ui"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 120_000  # ms; the pages are heavy, and machines are busy


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A git repository in which every stage has run with a tiny base."""
    root = prepare(
        tmp_path_factory.mktemp("ui"),
        {"trainer": {"logger": ["console", "mlflow"], "total_epochs": 10, "test_freq": 7}},
    )
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "--quiet"], ["add", "params.yaml"], ["commit", "--quiet", "--message", "parameters"]):
        subprocess.run([*git, *arguments], cwd=root, check=True)
    (root / "dvc.lock").write_text("schema: '2.0'\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        inline_workers(patch)
        for name in ("fetch", "tokenize", "respond", "cache", "train", "evaluate"):
            ok(name)
        yield root


@pytest.fixture(scope="module")
def ui(workspace: Path) -> Iterator[str]:
    """`make ui` in that folder; what it would install is here."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, workspace)
    (workspace / ".installed").touch()
    makefile = ["make", "--file", str(REPOSITORY / "Makefile"), "INSTALLED=.installed"]
    server = Server(workspace, [*makefile, f"BIN={Path(sys.executable).parent}", "PORT={port}", "ui"])
    server.start()
    yield server.uri
    server.kill()


@pytest.fixture(scope="module")
def page(ui: str) -> Iterator[Any]:
    """A page of a browser, at the list of experiments."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as driver:
        if found is None and not Path(driver.chromium.executable_path).is_file():
            pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is on the PATH")
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's does not work for root
        browser = driver.chromium.launch(executable_path=found, args=sandbox)
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(PATIENCE)
        page.goto(f"{ui}/#/experiments")
        page.get_by_text("Model training", exact=True).first.click()
        yield page
        browser.close()


@pytest.fixture
def shot(page: Any) -> Callable[[str], None]:
    """Keeps a picture of the page for people to look at."""

    def take(name: str) -> None:
        page.wait_for_timeout(1500)  # until what slides and fades has come to rest
        page.screenshot(path=SCREENSHOTS / f"{name}.png")

    return take


def record(folder: Path) -> Record:
    found = Record.load(folder / RUN_FILE)
    assert found is not None
    return found


def see(page: Any, text: str, exact: bool = True) -> None:
    """Wait until the page shows a text."""
    shown = page.get_by_text(text, exact=exact).first
    playwright.expect(shown).to_be_visible(timeout=PATIENCE)
    with contextlib.suppress(playwright.Error):  # for the screenshot alone; the page may just be drawing it anew
        shown.scroll_into_view_if_needed()


def open_run(page: Any, ui: str, run: str, tab: str = "") -> None:
    page.goto(f"{ui}/#/experiments/1/runs/{run}{tab}")


def see_picture(page: Any, path: Path) -> None:
    """Wait until an artifact is shown as a picture of its own size."""
    see(page, f"{path.parent.name}/{path.name}")
    width, height = (int.from_bytes(path.read_bytes()[at : at + 4]) for at in (16, 20))  # of a PNG
    page.wait_for_function(
        "([w, h]) => [...document.images].some(i => i.naturalWidth == w && i.naturalHeight == h)",
        arg=[width, height],
        timeout=PATIENCE,
    )


def test_the_run_is_in_the_list_with_its_evaluation(page: Any, shot: Callable[[str], None]) -> None:
    page.get_by_role("link", name="speculator", exact=True).first.click()
    see(page, "2 matching runs", exact=False)
    page.get_by_test_id("saved-views-trigger").click()
    page.get_by_text("speculators", exact=True).last.click()
    see(page, "1 matching run", exact=False)
    for name in ("method", "answers", "head", "hybrid", "x_plain"):
        playwright.expect(page.get_by_role("columnheader", name=name, exact=True).first).to_be_in_viewport()
    shot("1-runs")
    page.get_by_role("link", name="train", exact=True).first.click()
    see(page, "About this run")
    see(page, "Metrics (20)")
    see(page, "sum_rnn, 3 heads, best at step", exact=False)


def test_a_run_names_everything_that_it_follows_from(page: Any, ui: str, shot: Callable[[str], None]) -> None:
    made = record(common.MODEL)
    open_run(page, ui, made.run_id)
    see(page, "Finished")
    page.get_by_role("link", name="evaluate", exact=True).first.wait_for()
    assert len(set(made.tags) - {name for name in made.tags if name.startswith("mlflow.")}) <= 11  # and "record"
    for name in ("git.commit", "git.dirty", "dvc.lock", "features", "base.name", "base.weights", "hardware.device"):
        see(page, f"{name}:", exact=False)
    see(page, made.tags["git.commit"][:7], exact=False)
    shot("2-lineage")
    see(page, "model.speculator.n_predict")
    page.get_by_placeholder("Search parameters").fill("n_predict")
    see(page, "Parameters (", exact=False)
    shot("3-parameters")


def test_a_runs_data_files_are_its_inputs(page: Any, ui: str, shot: Callable[[str], None]) -> None:
    sources = common.read_sources()["files"]
    open_run(page, ui, record(common.MODEL).run_id)
    ((path, digest),) = sources["train"].items()
    page.get_by_text(path, exact=False).first.click()
    for split in ("train", "val"):
        ((path, digest),) = sources[split].items()
        see(page, path, exact=False)
        see(page, digest[:36], exact=False)
    shot("4-data")
    page.keyboard.press("Escape")


def test_curves_are_drawn(page: Any, ui: str, shot: Callable[[str], None]) -> None:
    open_run(page, ui, record(common.MODEL).run_id, "/model-metrics")
    for name in ("loss", "tokens_per_step", "val_loss"):
        playwright.expect(page.get_by_text(f"train (curves/{name})")).to_be_in_viewport(timeout=PATIENCE)
    drawn = page.locator(".js-plotly-plot .scatterlayer .trace path.js-line").nth(2)
    playwright.expect(drawn).to_be_attached(timeout=PATIENCE)
    shot("5-curves")


def test_the_pictures_are_shown(page: Any, ui: str, shot: Callable[[str], None]) -> None:
    for folder, names in (
        (common.MODEL, ("loss", "accuracy", "tokens_per_step")),
        (Path("results/evaluate"), ("acceptance", "domains")),
    ):
        made = record(folder)
        open_run(page, ui, made.run_id, f"/artifacts/{made.name}/{names[0]}.png")
        for name in names:
            page.get_by_text(f"{name}.png", exact=True).first.click()
            see_picture(page, Path(f"results/{made.name}/{name}.png"))
            shot(f"6-{made.name}-{name}")


def test_the_checkpoint_is_a_model_that_refers_to_its_run(page: Any, ui: str, shot: Callable[[str], None]) -> None:
    page.goto(f"{ui}/#/experiments/1/models")
    see(page, "Ready")
    see(page, "train")
    shot("7-models")
    page.locator('a[href*="/models/m-"]').first.click()
    see(page, "Source run")
    for name in ("val", "hybrid"):
        see(page, name)
    see(page, files.read_json(common.MODEL / "config.json")["base_digest"][:20], exact=False)
    shot("8-model")
    page.get_by_text("Artifacts", exact=True).first.click()
    for name in ("config.json", "pytorch_model.bin"):
        see(page, name)
    shot("9-model-files")


def test_the_evaluation_belongs_to_the_run(page: Any, ui: str, shot: Callable[[str], None]) -> None:
    made = record(Path("results/evaluate"))
    open_run(page, ui, made.run_id)
    see(page, "Tokens per step: head", exact=False)
    see(page, "Metrics (11)")
    shot("10-evaluate")
    see(page, "Parent run")
    ((path, _),) = common.read_sources()["files"]["eval"].items()
    see(page, path, exact=False)
    page.get_by_role("link", name="train", exact=True).first.click()
    page.wait_for_url(f"**/runs/{record(common.MODEL).run_id}**")

import functools
import sys
from pathlib import Path

import pytest

from spec import plots


@pytest.mark.filterwarnings("error")
def test_pictures_whatever_the_names(tmp_path: Path) -> None:
    plots.curves(tmp_path / "new/curves.png", {"a": ([1, 2], [3.0, 4.0])}, "x", "y")
    names = ["maths", "$x$", "$\\frac", "", "a\nb", "😀", "x" * 300, *map(str, range(200))]
    plots.bars(tmp_path / "bars.png", {name: {"head": 1.5, "$y": 1.2} for name in names}, "y", baseline=1.0)
    for path in ("new/curves.png", "bars.png"):
        assert (tmp_path / path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "shown"), [("x" * 24, "x" * 24), ("a" * 20 + "z" * 20, "a" * 11 + "…" + "z" * 12)])
def test_long_names_lose_their_middle(name: str, shown: str) -> None:
    assert plots.short(name) == shown


def test_without_matplotlib_a_run_has_no_pictures_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plots, "_drawing", functools.cache(plots._drawing.__wrapped__))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plots.curves(tmp_path / "curves.png", {"a": ([1], [1.0])}, "x", "y")
    plots.bars(tmp_path / "bars.png", {"a": {"b": 1.0}}, "y", baseline=1.0)
    assert not any(tmp_path.iterdir())
    assert caplog.messages == ["matplotlib is not installed: no pictures are drawn"]

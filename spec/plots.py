"""The pictures of a run: what MLflow shows and results/ keeps. Where matplotlib is not installed, none are drawn."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def curves(path: Path, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> None:
    """Lines over a common axis: name -> (x values, y values)."""
    if not _drawing():
        return
    with _picture(path, x, y) as axes:
        for name, (xs, ys) in lines.items():
            axes.plot(xs, ys, marker="o" if len(xs) < 20 else None, markersize=4, label=name)


def bars(path: Path, groups: Mapping[str, Mapping[str, float]], y: str, baseline: float) -> None:
    """Bars side by side: group -> name -> value, the same names in every group; a dashed line at the baseline."""
    if not _drawing():
        return
    with _picture(path, "", y, width=max(7, min(len(groups), 100))) as axes:
        names = list(next(iter(groups.values()), {}))
        width = 0.8 / max(len(names), 1)
        for index, name in enumerate(names):
            places = [group + (index - (len(names) - 1) / 2) * width for group in range(len(groups))]
            drawn = axes.bar(places, [values[name] for values in groups.values()], width * 0.95, label=name)
            axes.bar_label(drawn, fmt="%.2f", fontsize=8)
        slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(groups) > 6 else {}
        axes.set_xticks(range(len(groups)), [short(name) for name in groups], **slanted)
        axes.axhline(baseline, color="grey", linestyle="--", linewidth=1)


def short(name: str, limit: int = 24) -> str:
    """A name with its middle left out where it is longer than a column or an axis has room for."""
    return name if len(name) <= limit else f"{name[: limit // 2 - 1]}…{name[-(limit // 2) :]}"


@functools.cache
def _drawing() -> bool:
    """Whether pictures can be drawn; says once that they cannot."""
    try:
        import matplotlib as mpl  # takes a second, and not every machine that computes has it
    except ImportError:
        log.warning("matplotlib is not installed: no pictures are drawn")
        return False
    mpl.use("Agg")
    mpl.rcParams["text.parse_math"] = False  # "$x$" is a name, no formula
    return True


@contextlib.contextmanager
def _picture(path: Path, x: str, y: str, width: float = 7) -> Iterator[Any]:
    """Give axes to draw on, and save the picture."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(width, 4), layout="constrained")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    yield axes
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box stands for it
        figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)

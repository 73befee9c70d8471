"""What every engine's format has: what it can hold, its config.json, its names, and how it is served."""

from __future__ import annotations

import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spec.config import parse_dims
from spec.errors import SpecError
from spec.heads import CheckpointError, SpeculatorConfig


class ExportError(SpecError):
    """A speculator that a format cannot hold, or a folder that is in the way: says why, and what would fit."""


class Format(ABC):
    """An engine's checkpoint format.

    Attributes:
        name: as the command line has it.
        prefix: what the names of its tensors begin with.
    """

    name: str
    prefix: str = ""

    @abstractmethod
    def check(self, config: SpeculatorConfig) -> None:
        """Refuse what the format cannot hold.

        Raises:
            ExportError: the reason, and what would fit.
        """

    @abstractmethod
    def config(self, config: SpeculatorConfig, base_architectures: Sequence[str]) -> dict[str, Any]:
        """What the engine reads in config.json.

        Args:
            config: one that check accepts.
            base_architectures: of the base's own config.json; empty where they are not known.
        """

    @abstractmethod
    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The other way: the fields of a SpeculatorConfig, but the base's, that a config.json of the format names.

        Raises:
            CheckpointError: a value that is missing, or that makes another network than ours.
        """

    def key(self, name: str) -> str:
        """The format's name, without prefix, of the tensor that save calls `name`."""
        return name

    def name_of(self, key: str) -> str:
        """The inverse of key."""
        return key

    @abstractmethod
    def serve(self, config: SpeculatorConfig, folder: Path, base_architectures: Sequence[str]) -> str:
        """The shell command that serves the base with the export in a folder."""


def equal_width(config: SpeculatorConfig, name: str) -> int:
    """The one width of a recurrent speculator whose three widths are one.

    Args:
        config: of sum_rnn or sum_lstm.
        name: the format's, for the message.

    Raises:
        ExportError: a stack of widths, or widths that differ.
    """
    dims = {key: getattr(config, key) for key in ("inner_dim", "emb_dim", "proj_dim")}
    found = ", ".join(f"{key} {'.'.join(map(str, value))}" for key, value in dims.items())
    if any(len(value) > 1 for value in dims.values()):
        raise ExportError(
            f"format {name} holds no stack of widths (found {found}): the engine builds another network from such a "
            "list than the one that was trained. One integer for all three fits"
        )
    if len(set(dims.values())) > 1:
        raise ExportError(
            f"format {name} has one width for embedding, projection and output (found {found}): the engine adds and "
            "normalises them as they are. Train with the three widths equal"
        )
    return config.inner_dim[0]


def no_draft_vocabulary(config: SpeculatorConfig, name: str) -> None:
    """Refuse a part of the vocabulary where the engine takes a head's row number for the token.

    Raises:
        ExportError: the speculator has one.
    """
    if config.draft_vocab_size is not None:
        raise ExportError(
            f"format {name} has no draft vocabulary: the engine takes the row number of a head's output for the token, "
            f"and this speculator's {config.draft_vocab_size} rows stand for others. Train with "
            "model.speculator.draft_vocab_size=null; format vllm-medusa holds the draft vocabulary of a medusa "
            "speculator"
        )


def number(values: Mapping[str, Any], name: str) -> int:
    """A positive integer of a config.json.

    Raises:
        CheckpointError: it is missing or something else.
    """
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{name} is {value!r}, expected a positive integer")
    return value


def flag(values: Mapping[str, Any], name: str) -> bool:
    """A switch of a config.json; false where it is missing, as the public classes have it.

    Raises:
        CheckpointError: neither true nor false.
    """
    value = values.get(name, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"{name} is {value!r}, expected true or false")
    return value


def single_width(values: Mapping[str, Any], name: str) -> int:
    """One width of a config.json, in any of the ways that public trainers write it: 4096, "4096", [4096], "[4096]".

    Raises:
        CheckpointError: it is missing, no width, or a stack of widths.
    """
    value = values.get(name)
    try:
        dims = parse_dims(value.strip("[]") if isinstance(value, str) else value)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None
    if len(dims) > 1:
        raise CheckpointError(
            f"{name} is {value!r}: public code makes another network from a stack of widths than this "
            "project; a head of one width can be imported"
        )
    return dims[0]


def vllm_command(
    config: SpeculatorConfig, folder: Path, method: str, environment: str = "", options: Mapping[str, Any] | None = None
) -> str:
    """`vllm serve` of the base with the speculator in a folder, quoted for a shell.

    Args:
        config: of the speculator.
        folder: of the export.
        method: as --speculative-config names it.
        environment: assignments before the command.
        options: further ones, their values as JSON.
    """
    model = shlex.quote(config.base_model_name_or_path)
    revision = f" --revision {shlex.quote(config.base_revision)}" if config.base_revision else ""
    speculative = {"method": method, "model": str(folder), "num_speculative_tokens": config.n_predict}
    lines = [f"{environment}vllm serve {model}{revision}"]
    for name, value in {**(options or {}), "speculative-config": speculative}.items():
        lines.append(f"    --{name} {shlex.quote(json.dumps(value))}")
    return " \\\n".join(lines)

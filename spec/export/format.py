"""What the writer asks of an engine's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spec.errors import SpecError
from spec.heads import SpeculatorConfig


class ExportError(SpecError):
    """A speculator that the format cannot hold, or a folder that is in the way: says why, and what would fit."""


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: by which it is asked for.
        check: raises an ExportError with the reason where the format cannot hold such a speculator; nothing below is
            called with one that it refuses.
        describe: the network, for the card.
        config: what the engine reads in config.json, given the architectures in the base's own config.json (empty
            where they are not known).
        tensors: the engine's, by name, from those of the speculator, each tied one once.
        command: the shell command that serves the base with the export in a folder; architectures as for config.
    """

    name: str
    check: Callable[[SpeculatorConfig], object]
    describe: Callable[[SpeculatorConfig], str]
    config: Callable[[SpeculatorConfig, Sequence[str]], dict[str, Any]]
    tensors: Callable[[SpeculatorConfig, Mapping[str, Tensor]], dict[str, Tensor]]
    command: Callable[[SpeculatorConfig, Path, Sequence[str]], str]

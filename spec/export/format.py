"""What every engine's format has: what it can hold, its config.json, and how it is served."""

from __future__ import annotations

import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spec.errors import SpecError
from spec.heads import SpeculatorConfig


class ExportError(SpecError):
    """A speculator that a format cannot hold, or a folder that is in the way: says why, and what would fit."""


class Format(ABC):
    """An engine's checkpoint format.

    Attributes:
        name: as the command line has it.
    """

    name: str

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
    def serve(self, config: SpeculatorConfig, folder: Path, base_architectures: Sequence[str]) -> str:
        """The shell command that serves the base with the export in a folder."""


def vllm_command(config: SpeculatorConfig, folder: Path, method: str, environment: str = "") -> str:
    """`vllm serve` of the base with the speculator in a folder, quoted for a shell.

    Args:
        config: of the speculator.
        folder: of the export.
        method: as --speculative-config names it.
        environment: assignments before the command.
    """
    model = shlex.quote(config.base_model_name_or_path)
    revision = f" --revision {shlex.quote(config.base_revision)}" if config.base_revision else ""
    speculative = {"method": method, "model": str(folder), "num_speculative_tokens": config.n_predict}
    return (
        f"{environment}vllm serve {model}{revision} \\\n    --speculative-config {shlex.quote(json.dumps(speculative))}"
    )

"""Training checkpoints: atomic, complete or absent."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spec import files, heads
from spec.heads import Speculator

_STATE = "training.pt"
_PREFIX = "global_step_"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: `folder/global_step_N/` holds the speculator in its own format, and the newest
    also the optimizer's state, from which the same command goes on."""

    folder: Path
    key: str  # digest of everything that the run's result depends on; another run's state is never taken up

    def save(self, step: int, speculator: Speculator, state: dict[str, Any]) -> None:
        """Write a checkpoint; older ones keep their speculator and lose their optimizer state."""
        files.sweep(self.folder)
        with files.whole(self.folder / f"{_PREFIX}{step}", folder=True) as temporary:
            heads.save(speculator, temporary)
            torch.save({"key": self.key, "step": step, **state}, temporary / _STATE)
        for older in self._steps():
            if older < step:
                files.remove(self.folder / f"{_PREFIX}{older}" / _STATE)

    def newest(self) -> dict[str, Any] | None:
        """The state of the newest checkpoint that this run can go on from."""
        for step in reversed(self._steps()):
            path = self.folder / f"{_PREFIX}{step}"
            if (path / _STATE).is_file():
                # Mapped, so that the workers of a machine share its pages and nobody holds all of it.
                state: dict[str, Any] = torch.load(path / _STATE, map_location="cpu", weights_only=True, mmap=True)
                if state["key"] == self.key:
                    return state
        return None

    def finish(self) -> None:
        """The run is complete: nothing is left to resume."""
        for step in self._steps():
            files.remove(self.folder / f"{_PREFIX}{step}" / _STATE)

    def _steps(self) -> list[int]:
        found = (re.fullmatch(rf"{_PREFIX}(\d+)", path.name) for path in self.folder.glob(f"{_PREFIX}*"))
        return sorted(int(match[1]) for match in found if match)

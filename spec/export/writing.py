"""Write a speculator as a folder of an engine: model.safetensors, config.json and a card."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from spec import files, heads
from spec.export import arctic, card
from spec.export.arctic import ExportError, HeldConfig
from spec.heads import Speculator, checkpoint

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"


@dataclass(frozen=True)
class Written:
    """The speculator's config, the bytes of its weights, and the command by which the engine serves it."""

    config: HeldConfig
    bytes: int
    command: str


def write(
    source: Path,
    folder: Path,
    dtype: torch.dtype,
    *,
    base: str | None = None,
    base_architectures: Sequence[str] = (),
    measured: card.Measured = card.Measured(),  # noqa: B008 - frozen
) -> Written:
    """Export the checkpoint in a folder for ArcticInference; the new folder appears whole or not at all.

    Args:
        source: the checkpoint.
        folder: is made; an earlier export in it is replaced.
        dtype: of the weights in it.
        base: where engines find the base; by default where the checkpoint says.
        base_architectures: of the base's own config.json; empty where they are not known.
        measured: for the card.

    Raises:
        ExportError: arctic cannot hold this speculator, a weight is too large for dtype, or the folder holds
            something else.
        FileNotFoundError, CheckpointError: no checkpoint in source.
    """
    config = arctic.check(heads.read_config(source))
    _check_free(folder)
    if base is not None:
        config = config.model_copy(update={"base_model_name_or_path": base, "base_revision": None})
    speculator = heads.load(source)
    command = arctic.command(config, folder, base_architectures)
    with files.whole(folder, folder=True) as temporary:
        # Some readers refuse a file that does not say which framework wrote it.
        save_file(tensors(speculator, dtype), temporary / WEIGHTS, {"format": "pt"})
        size = (temporary / WEIGHTS).stat().st_size
        files.write_json(temporary / CONFIG, _config(config, base_architectures, dtype))
        digest = files.digest_file(source / checkpoint.WEIGHTS)
        text = card.text(config, speculator.num_parameters(), dtype, digest, command, measured)
        (temporary / CARD).write_text(text)
    return Written(config, size, command)


def tensors(speculator: Speculator, dtype: torch.dtype) -> dict[str, Tensor]:
    """The speculator's tensors by name, each tied one once.

    Raises:
        ExportError: a weight that dtype cannot hold.
    """
    found: dict[str, Tensor] = {}
    for name, weight in checkpoint.weights(speculator, dtype).items():
        if any(weight is other for other in found.values()):
            continue
        if not weight.isfinite().all():
            raise ExportError(
                f"{name} has values that {str(dtype).removeprefix('torch.')} cannot hold; bfloat16 and float32 can"
            )
        found[name] = weight
    return found


def _config(config: HeldConfig, base_architectures: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """The engine's keys, and those by which the base is known when the folder is imported."""
    base = {name: getattr(config, name) for name in ("base_model_name_or_path", "base_revision", "base_digest")}
    return {
        **arctic.engine_config(config, base_architectures),
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{name: value for name, value in base.items() if value},
    }


def read_architectures(base: str, revision: str | None) -> list[str]:
    """What a base's config.json names as its architectures; none where the base is not on this machine."""
    path: Any = Path(base) / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache  # only where a hub is used
        from huggingface_hub.errors import HFValidationError

        with contextlib.suppress(HFValidationError):  # a folder that is not here
            path = try_to_load_from_cache(base, "config.json", revision=revision)
        if not isinstance(path, str):
            return []
    found = files.read_json(Path(path)).get("architectures")
    return [str(name) for name in found] if isinstance(found, list) else []


def measured_on(source: Path) -> card.Measured:
    """What the results beside a checkpoint say of it.

    Figures are taken only where they name these very weights; results lie in the project (models/speculator) or
    in the checkpoint's folder (the guide's script).
    """
    root = source.resolve()
    if root.parts[-2:] == ("models", "speculator"):
        root = root.parents[1]
    digest = files.digest_file(source / checkpoint.WEIGHTS)
    found = [_results(root / "results" / stage / "details.json", digest) for stage in ("train", "evaluate")]
    return card.Measured(features=(found[0] or {}).get("features"), figures=found[1])


def _results(path: Path, digest: str) -> dict[str, Any] | None:
    """A stage's metrics, if they belong to the weights with this digest."""
    try:
        values = files.read_json(path)
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and values.get("speculator") == digest else None


def _check_free(folder: Path) -> None:
    """Refuse a folder that holds anything but an export."""
    if folder.is_file():
        raise ExportError(f"{folder} is a file; name a folder")
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    others = [name for name in found if name not in (WEIGHTS, CONFIG, CARD)]
    if others:
        raise ExportError(f"{folder} holds {', '.join(others[:5])}; name a folder that is empty or not there")
    if found and (CARD not in found or card.MARK not in (folder / CARD).read_text(errors="replace")):
        raise ExportError(f"{folder} holds a model that no export made; name a folder that is empty or not there")

"""Write a speculator as a folder of an engine: model.safetensors, config.json and a card."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from spec import files, heads
from spec.export import card, reading
from spec.export.arctic import ARCTIC
from spec.export.eagle3 import VLLM
from spec.export.format import ExportError, Format
from spec.heads import LAST, Packed, Speculator, SpeculatorConfig, checkpoint

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"

FORMATS: Mapping[str, Format] = {form.name: form for form in (ARCTIC, VLLM)}

CHECKED = 48
"""Tokens of the sequence along which an export and its checkpoint are compared."""


@dataclass(frozen=True)
class Written:
    """The speculator's config, the bytes of its weights, and the command by which the engine serves it."""

    config: SpeculatorConfig
    bytes: int
    command: str


def write(
    source: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    form: Format = ARCTIC,
    base: str | None = None,
    base_architectures: Sequence[str] = (),
    measured: card.Measured = card.Measured(),  # noqa: B008 - frozen
) -> Written:
    """Export the checkpoint in a folder for an engine; the new folder appears whole or not at all, and only where it
    drafts what the checkpoint drafts.

    Args:
        source: the checkpoint.
        folder: is made; an earlier export in it is replaced.
        dtype: of the weights in it; None: as they are stored.
        form: the engine's format.
        base: where engines find the base; by default where the checkpoint says.
        base_architectures: of the base's own config.json; empty where they are not known.
        measured: for the card.

    Raises:
        ExportError: the format cannot hold this speculator, a weight is too large for dtype, or the folder holds
            something else.
        FileNotFoundError, CheckpointError: no checkpoint in source.
    """
    config = heads.read_config(source)
    form.check(config)
    _check_free(folder)
    if base is not None:
        config = config.model_copy(update={"base_model_name_or_path": base, "base_revision": None})
    speculator = heads.restore(config, heads.read_weights(source / checkpoint.WEIGHTS), heads.no_tables(config))
    command = form.command(config, folder, base_architectures)
    with files.whole(folder, folder=True) as temporary:
        weights = tensors(speculator, dtype)
        # Some readers refuse a file that does not say which framework wrote it.
        save_file(form.tensors(config, weights), temporary / WEIGHTS, {"format": "pt"})
        size = (temporary / WEIGHTS).stat().st_size
        stored = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
        values = form.config(config, base_architectures) | _names(config, stored)
        files.write_json(temporary / CONFIG, values)
        _check_drafts(temporary, heads.restore(config, weights, heads.no_tables(config)))
        digest = files.digest_file(source / checkpoint.WEIGHTS)
        text = card.text(form, config, speculator.num_parameters(), stored, digest, command, measured)
        (temporary / CARD).write_text(text)
    return Written(config, size, command)


def tensors(speculator: Speculator, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The speculator's own tensors by name, each tied one once.

    Raises:
        ExportError: a weight that dtype cannot hold.
    """
    found: dict[str, Tensor] = {}
    for name, weight in checkpoint.weights(speculator, dtype).items():
        if any(weight is other for other in found.values()):
            continue
        if not weight.isfinite().all():
            raise ExportError(
                f"{name} has values that {str(weight.dtype).removeprefix('torch.')} cannot hold; bfloat16 and float32 "
                "can"
            )
        found[name] = weight
    return found


def _names(config: SpeculatorConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What every config.json has: the dtype, and by what the base is known when the folder is imported."""
    base = {name: getattr(config, name) for name in ("base_model_name_or_path", "base_revision", "base_digest")}
    return {"torch_dtype": str(dtype).removeprefix("torch."), **{name: value for name, value in base.items() if value}}


def _check_drafts(folder: Path, speculator: Speculator) -> None:
    """Read an export again, and compare its drafts: engines do not report a tensor that is missing.

    Raises:
        ExportError: they differ.
    """
    if not torch.equal(_drafts(reading.read(str(folder))), _drafts(speculator)):
        raise ExportError("the export was read again and drafts other tokens than the checkpoint; nothing was written")


def _drafts(speculator: Speculator) -> Tensor:
    """In float32, along made-up tokens and vectors of the base."""
    config, drawn = speculator.config, torch.Generator().manual_seed(0)
    d, V = config.hidden_size, config.vocab_size
    # Rows that overlap differ from each other, and take no memory.
    table = torch.randn(V + d - 1, generator=drawn).unfold(0, d, 1)
    speculator = speculator.float().eval()
    speculator.lend(dict.fromkeys(speculator.borrowed.values(), table))
    ids = torch.randint(V, (CHECKED,), generator=drawn)
    packed = Packed.of(ids, torch.ones(CHECKED, dtype=torch.bool), [CHECKED], {})
    counts = {tap: len(packed.starts) if tap == LAST else CHECKED for tap in speculator.taps}
    states = {tap: torch.randn(count, d, generator=drawn) for tap, count in counts.items()}
    return speculator.draft_along(replace(packed, states=states), torch.arange(len(packed.starts)), config.n_predict)


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
    """What the results next to a checkpoint say of it.

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

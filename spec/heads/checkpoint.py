"""A speculator as a directory: pytorch_model.bin (its weights, nothing else) and config.json. The index of training
answers next to them (spec.lookup) is no part of it: without one, less is drafted."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spec import files
from spec.errors import SpecError
from spec.heads import registry
from spec.heads.config import SpeculatorConfig
from spec.heads.speculator import Speculator

log = logging.getLogger(__name__)

WEIGHTS = "pytorch_model.bin"
CONFIG = "config.json"


class CheckpointError(SpecError):
    """A checkpoint that cannot be used: says what was found and what was expected."""


def save(speculator: Speculator, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write what build or load returned, in its own dtype by default. Each file appears whole or not at all, and an
    earlier checkpoint in the folder is replaced."""
    path = Path(folder)
    with files.whole(path / WEIGHTS) as temporary, temporary.open("wb") as file:
        # Given a name, torch.save writes it into the file: the same weights would be other bytes each time.
        torch.save(weights(speculator, dtype), file)
    files.write_json(path / CONFIG, speculator.config.to_json())


def load(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    tables: Mapping[str, Tensor] | None = None,
) -> Speculator:
    """Read what save wrote, its weights as they are stored unless a dtype is given; tables as for restore.

    Raises:
        FileNotFoundError, CheckpointError: a file is missing, or the two do not fit each other.
    """
    config = read_config(folder)
    return restore(config, read_weights(_existing(folder, WEIGHTS)), tables).to(device=device, dtype=dtype)


def restore(
    config: SpeculatorConfig, state: dict[str, Tensor], tables: Mapping[str, Tensor] | None = None
) -> Speculator:
    """The config's network with these weights, which it takes over as they are; tied ones may have any of their names.
    A head that borrows the base's "embedding" or "lm_head" needs them in `tables`.

    Raises:
        CheckpointError: names or shapes that do not fit the config, tied weights that differ, or no tables.
    """
    lent = {} if tables is None else tables
    if lacking := sorted(set(registry.method(config.method).borrowed.values()) - lent.keys()):
        raise CheckpointError(f"{config.method} reads the base's {' and '.join(lacking)}: give the base's tables")
    try:
        with torch.device("meta"):  # no time and memory for weights that are replaced at once
            speculator = registry.build(config, state.get("token_map"))
        places = {name: tensor for name, tensor in speculator.state_dict().items() if name in speculator.borrowed}
        speculator.load_state_dict(_with_aliases(state, speculator) | places, assign=True)
        speculator.lend(lent)
    except ValueError as error:
        raise CheckpointError(f"{WEIGHTS}: {error}") from None
    except RuntimeError as error:  # names or shapes; it lists them
        raise CheckpointError(f"{WEIGHTS} does not fit {CONFIG}: {error}") from None
    return speculator


def no_tables(config: SpeculatorConfig) -> dict[str, Tensor]:
    """Tensors without values in place of those that a head borrows, to read and write it without drafting."""
    names = registry.method(config.method).borrowed.values()
    return {name: torch.empty(config.vocab_size, config.hidden_size, device="meta") for name in names}


def read_config(folder: str | os.PathLike[str]) -> SpeculatorConfig:
    """The config of the checkpoint in a folder, without its weights.

    Raises:
        FileNotFoundError, CheckpointError: there is none, or it is no speculator's.
    """
    path = _existing(folder, CONFIG)
    try:
        values = files.read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"found a {type(values).__name__}, expected an object")
        return registry.parse_config(values)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def check_base(
    config: SpeculatorConfig, vocab_size: int, hidden_size: int, digest: str, *, allow_other_weights: bool = False
) -> None:
    """Refuse a speculator that was trained on a base with other widths, or with another digest of its weights.

    If the speculator does not say which weights it was trained on, only the widths are compared, and the log says so.
    allow_other_weights accepts other weights of the same shape, such as a fine-tune's.
    """
    name = config.base_model_name_or_path
    for field, found in (("hidden_size", hidden_size), ("vocab_size", vocab_size)):
        trained = getattr(config, field)
        if trained != found:
            raise CheckpointError(
                f"{field}: the speculator was trained on {name} with {trained}, this base has {found}"
            )
    if allow_other_weights:
        return
    if not config.base_digest:
        log.warning("the speculator does not say which weights of %s it was trained on; its widths fit this base", name)
    elif config.base_digest != digest:
        raise CheckpointError(
            f"base_digest: the speculator was trained on {name} with weights {config.base_digest}, this base's are "
            f"{digest}. The shapes agree: if this is a fine-tune of that base, "
            "start from the speculator and train on its own answers (model.speculator.init), or pass "
            "allow_other_weights=True in Python (drafts may be accepted less often)"
        )


def weights(speculator: Speculator, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state dict on the CPU in a dtype, without what is borrowed; tied weights are still tied, so that torch.save
    stores each of them once."""
    seen: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for key, tensor in speculator.state_dict(keep_vars=True).items():
        if key in speculator.borrowed:
            continue
        if id(tensor) not in seen:
            stored = dtype if tensor.is_floating_point() else None
            seen[id(tensor)] = tensor.detach().to(device="cpu", dtype=stored).contiguous()
        state[key] = seen[id(tensor)]
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict that torch.save wrote, on the CPU; no code in it is run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds something other than tensors, which is not loaded: {error}") from None
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is not a whole file of torch.save: {error}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a state dict: names and tensors")
    return state


def _with_aliases(state: dict[str, Tensor], speculator: Speculator) -> dict[str, Tensor]:
    """The state with tied weights under all of their names; it may have any of them."""
    names: dict[int, list[str]] = {}
    for key, tensor in speculator.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(key)
    whole = dict(state)
    for keys in names.values():
        found = [key for key in keys if key in state]
        for other in found[1:]:
            if not torch.equal(state[found[0]], state[other]):
                raise CheckpointError(f"{found[0]} and {other} differ in {WEIGHTS}, but {CONFIG} ties them")
        if found:
            whole |= dict.fromkeys(keys, state[found[0]])
    return whole


def _existing(folder: str | os.PathLike[str], name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a speculator's folder holds {WEIGHTS} and {CONFIG}")
    return path

"""A speculator as a directory: pytorch_model.bin (its weights, nothing else) and config.json."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path

import torch
from torch import Tensor

from spec import files
from spec.errors import SpecError
from spec.heads.build import METHODS, build
from spec.heads.config import SpeculatorConfig
from spec.heads.speculator import Speculator

log = logging.getLogger(__name__)

WEIGHTS = "pytorch_model.bin"
CONFIG = "config.json"


class CheckpointError(SpecError):
    """A checkpoint that cannot be used: says what was found and what was expected."""


def save(speculator: Speculator, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write the speculator; each file appears whole or not at all, config.json last.

    Args:
        speculator: what build or load returned (no wrapper for data-parallel training, no fused copy).
        folder: created where it is missing; an earlier checkpoint in it is replaced.
        dtype: of the stored weights; as they are by default.

    Raises:
        TypeError: a wrapper or a fused copy.
    """
    if not isinstance(speculator, tuple(METHODS.values())):
        raise TypeError(f"save takes a speculator as build made it, not a {type(speculator).__name__}")
    path = Path(folder)
    with files.whole(path / WEIGHTS) as temporary, temporary.open("wb") as file:
        # Given a name, torch.save writes it into the file: the same weights would be other bytes each time.
        torch.save(_weights(speculator, dtype), file)
    files.write_json(path / CONFIG, speculator.config.to_json())


def load(
    folder: str | os.PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Speculator:
    """Read what save wrote, or a file of the same layout whose tied weights are stored once.

    Args:
        folder: holds pytorch_model.bin and config.json.
        device: where the speculator goes.
        dtype: of the loaded weights; as they are stored by default.

    Raises:
        FileNotFoundError: one of the two files is missing.
        CheckpointError: unreadable files, a pickle with anything but tensors in it, keys or shapes that do not fit
            the config, or tied weights that differ.
    """
    config = read_config(folder)
    return restore(config, read_weights(_existing(Path(folder), WEIGHTS))).to(device=device, dtype=dtype)


def restore(config: SpeculatorConfig, state: dict[str, Tensor]) -> Speculator:
    """The config's network with these weights, which it takes over as they are.

    Args:
        config: the network's shape.
        state: by the names that save writes; tied weights under one of their names at least.

    Raises:
        CheckpointError: names or shapes that do not fit the config, or tied weights that differ.
    """
    if (config.draft_vocab_size is not None) != ("token_map" in state):
        raise CheckpointError(
            f"{CONFIG} has draft_vocab_size {config.draft_vocab_size}, but {WEIGHTS} has "
            f"{'a' if 'token_map' in state else 'no'} token_map"
        )
    try:
        with torch.device("meta"):  # no time and memory for weights that are replaced at once
            speculator = build(config, state.get("token_map"))
    except ValueError as error:
        raise CheckpointError(f"{WEIGHTS}: {error}") from None
    speculator.load_state_dict(_matched(state, speculator), assign=True)
    return speculator


def read_config(folder: str | os.PathLike[str]) -> SpeculatorConfig:
    """The config of the checkpoint in a folder, without its weights.

    Raises:
        FileNotFoundError: no config.json.
        CheckpointError: it is no speculator's config.
    """
    path = _existing(Path(folder), CONFIG)
    try:
        values = files.read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"found a {type(values).__name__}, expected an object")
        return SpeculatorConfig.from_json(values)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def check_base(
    config: SpeculatorConfig, vocab_size: int, hidden_size: int, digest: str, *, allow_other_weights: bool = False
) -> None:
    """Refuse a speculator that was trained on another base than the one at hand.

    A speculator from elsewhere may not say which weights it was trained on: then the widths alone are compared, and
    the log says so.

    Args:
        config: the checkpoint's.
        vocab_size: rows of the lm_head of the base at hand.
        hidden_size: width of its hidden states.
        digest: identity of its weights.
        allow_other_weights: accept other weights of the same shape, such as a fine-tune's.

    Raises:
        CheckpointError: names the field and both values.
    """
    for field, trained, found in (
        ("hidden_size", config.hidden_size, hidden_size),
        ("vocab_size", config.vocab_size, vocab_size),
    ):
        if trained != found:
            raise CheckpointError(
                f"{field}: the speculator was trained on {config.base_model_name_or_path} with {trained}, "
                f"this base has {found}"
            )
    if allow_other_weights:
        return
    if not config.base_digest:
        log.warning(
            "the speculator does not say which weights of %s it was trained on; its widths fit this base",
            config.base_model_name_or_path,
        )
    elif config.base_digest != digest:
        raise CheckpointError(
            f"base_digest: the speculator was trained on {config.base_model_name_or_path} with weights "
            f"{config.base_digest}, this base's are {digest}. The shapes agree: if this is a fine-tune of that base, "
            "start from the speculator and train on its own answers (model.speculator.init), or pass "
            "allow_other_weights=True in Python (drafts may be accepted less often)"
        )


def _weights(speculator: Speculator, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state dict on the CPU, tied weights still tied, so that torch.save stores each of them once."""
    seen: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for key, tensor in speculator.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            stored = dtype if tensor.is_floating_point() else None
            seen[id(tensor)] = tensor.detach().to(device="cpu", dtype=stored).contiguous()
        state[key] = seen[id(tensor)]
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict that torch.save wrote, on the CPU.

    Raises:
        CheckpointError: a torn file, or one that holds anything but tensors (no code in it is run).
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds something other than tensors, which is not loaded: {error}") from None
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is not a whole file of torch.save: {error}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a state dict: names and tensors")
    return state


def _matched(state: dict[str, Tensor], speculator: Speculator) -> dict[str, Tensor]:
    """The state with every key that the speculator has; a tied weight may be stored under some of its names only."""
    groups: dict[int, list[str]] = {}
    for key, tensor in speculator.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(key)
    missing = [keys[0] for keys in groups.values() if not any(key in state for key in keys)]
    unexpected = sorted(set(state) - {key for keys in groups.values() for key in keys})
    if missing or unexpected:
        raise CheckpointError(
            f"{WEIGHTS} does not fit {CONFIG}: missing {', '.join(missing) or 'none'}; "
            f"unexpected {', '.join(unexpected) or 'none'}"
        )
    expected = speculator.state_dict()
    matched: dict[str, Tensor] = {}
    for keys in groups.values():
        first, *others = [key for key in keys if key in state]
        if state[first].shape != expected[first].shape:
            raise CheckpointError(
                f"{first} has shape {list(state[first].shape)} in {WEIGHTS}, {list(expected[first].shape)} by {CONFIG}"
            )
        for other in others:
            if state[first].data_ptr() != state[other].data_ptr() and not torch.equal(state[first], state[other]):
                raise CheckpointError(f"{first} and {other} differ in {WEIGHTS}, but {CONFIG} ties them")
        matched.update(dict.fromkeys(keys, state[first]))
    return matched


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a speculator's folder holds {WEIGHTS} and {CONFIG}")
    return path

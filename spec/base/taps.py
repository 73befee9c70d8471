"""Reading the base's vectors: its last state, and what its layers read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spec.base.folder import BaseError
from spec.base.limits import limits_of, positions_of
from spec.heads import LAST, Tap


class _Kept(threading.local):
    """What each thread has read: several may run one model."""

    def __init__(self) -> None:
        self.states: dict[Tap, Tensor] = {}


class Tapped:
    """Keeps the newest vectors of some taps, for every forward of the base that runs inside the block.

    Raises:
        BaseError: the base has no such layer, or none that can be found.
    """

    def __init__(self, model: Any, taps: Sequence[Tap]) -> None:
        self._kept = _Kept()
        self._modules = {tap: _decoder(model) if tap.layer is None else _layer(model, tap.layer) for tap in taps}
        self._hooks: list[Any] = []

    @property
    def states(self) -> dict[Tap, Tensor]:
        """By tap its vectors [B, S, width] of this thread's newest forward, at all positions."""
        return self._kept.states

    def __enter__(self) -> Tapped:
        for tap, module in self._modules.items():
            if tap.layer is None:
                hook = module.register_forward_hook(partial(self._keep_output, tap))
            else:
                hook = module.register_forward_pre_hook(partial(self._keep_input, tap), with_kwargs=True)
            self._hooks.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep_output(self, tap: Tap, module: nn.Module, args: Any, output: Any) -> None:
        self.states[tap] = output.last_hidden_state

    def _keep_input(self, tap: Tap, module: nn.Module, args: Any, kwargs: Any) -> None:
        vectors = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(vectors, Tensor) or vectors.ndim != 3:
            found = list(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
            raise BaseError(
                f"layer {tap.layer} ({type(module).__name__}) reads {found}, expected one vector for each token "
                "[B, S, width]: heads that read layers cannot be trained for this base"
            )
        self.states[tap] = vectors


def read_taps(model: Any, ids: Tensor, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
    """The vectors [B, S, width] of each tap, at all positions of right-padded ids [B, S].

    Every layer is causal, so that padding on the right changes no vector of a real token. Padding beyond the last
    position that the model has is not read: its vectors are NaN.
    """
    length = ids.shape[1]
    made_for = positions_of(model.config) or length
    most = length if length <= made_for else limits_of(model).most or length
    with Tapped(model, taps) as tapped:
        _decoder(model)(input_ids=ids[:, :most], use_cache=False)
    if length <= most:
        return tapped.states
    return {tap: F.pad(states, (0, 0, 0, length - most), value=torch.nan) for tap, states in tapped.states.items()}


def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """The states after the final norm, which lm_head reads, as read_taps gives them."""
    return read_taps(model, ids, (LAST,))[LAST]


def _decoder(model: Any) -> nn.Module:
    """The part of a causal language model that makes the last state."""
    decoder: Any = model.get_decoder()
    # Some models of images (Llama 4) hold a whole language model.
    found: nn.Module = decoder.model if hasattr(decoder, "lm_head") else decoder
    return found


def layers_of(model: Any) -> nn.ModuleList | None:
    """The decoder layers of a causal language model, where they are a list."""
    decoder: Any = _decoder(model)
    count = decoder.config.get_text_config().num_hidden_layers
    lists = {path: m for path, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    return lists[min(lists, key=lambda path: path.count("."))] if lists else None  # experts lie deeper


def _layer(model: Any, number: int) -> nn.Module:
    """The layer whose input is the output after `number` layers."""
    layers, name = layers_of(model), type(model).__name__
    if layers is None:
        raise BaseError(f"{name} has no list of its layers, so heads that read layers cannot be trained for it")
    if not 0 <= number < len(layers):
        raise BaseError(f"{name} has the layers 0 to {len(layers) - 1}; there is no layer {number} to read")
    return layers[number]

"""What a base remembers: a key-value cache that appends in place and crops for free, or the base's own states."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

_BLOCK = 256
"""Positions by which a full buffer grows at least."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, [B, heads, length, head_dim] each, in buffers that double when full.

    transformers' DynamicLayer concatenates at every step, which copies the whole cache for each token; here a step
    writes its own positions only. Keys and values are views of the buffers, which crop makes shorter.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take dtype, device and shapes from the first keys and values."""
        super().lazy_initialization(key_states, value_states)
        self._show([key_states[:, :, :0], value_states[:, :, :0]], 0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append S positions (each [B, heads, S, head_dim]) and return all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, room = self.keys.shape[-2], self._buffers[0].shape[-2]
        stop = start + key_states.shape[-2]
        for i, states in enumerate((key_states, value_states)):
            if stop > room:
                old, (B, heads, _, width) = self._buffers[i], states.shape
                self._buffers[i] = states.new_empty(B, heads, max(stop + _BLOCK, 2 * room), width)
                self._buffers[i][:, :, :start] = old[:, :, :start]
            self._buffers[i][:, :, start:stop] = states
        self._show(self._buffers, stop)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        if self.is_initialized:
            self._show([buffer[indices] for buffer in self._buffers], self.keys.shape[-2])

    reorder_cache = batch_select_indices

    def _show(self, buffers: list[torch.Tensor], length: int) -> None:
        self._buffers = buffers
        self.keys, self.values = (buffer[:, :, :length] for buffer in buffers)


def make_cache(config: PretrainedConfig) -> DynamicCache:
    """A cache for a model of this configuration; layers of special kinds (sliding windows) stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class Memory:
    """A model with what it remembers of the tokens that it has read: in most families it is given a cache; a few make
    their own, and some keep a part in their layers."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._names = inspect.signature(model.forward).parameters
        self._makes_its_own = not getattr(model, "_supports_default_dynamic_cache", lambda: True)()
        name = "cache_params" if "cache_params" in self._names else "past_key_values"
        self._given: dict[str, Any] = {} if self._makes_its_own else {name: make_cache(model.config)}

    def forward(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """Logits after ids [B, S], which follow what was read; options that the model does not know are left out."""
        known = {name: value for name, value in options.items() if name in self._names}
        made = self._model(input_ids=ids, use_cache=True, **self._given, **known)
        if self._makes_its_own:
            found = {name: getattr(made, name, None) for name in ("past_key_values", "cache_params")}
            self._given = {name: value for name, value in found.items() if value is not None and name in self._names}
        logits: torch.Tensor = made.logits
        return logits

    def record(self) -> None:
        """Keep from now on what a crop may bring back: the past of sliding windows and of convolutions."""
        for memory in self._given.values():
            memory.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens."""
        for memory in self._given.values():
            memory.crop(tokens_to_remove)

    @property
    def can_drop_rows(self) -> bool:
        """Whether keep_rows reaches all of it."""
        layers = [layer for memory in self._given.values() for layer in getattr(memory, "layers", ())]
        reached = not self._model._is_stateful or any(hasattr(layer, "recurrent_states") for layer in layers)
        return reached and not self._makes_its_own

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Drop the other rows of the batch."""
        for memory in self._given.values():
            memory.reorder_cache(rows)  # unlike batch_select_indices it selects in recurrent states, too

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
    """One layer's keys and values in a buffer that doubles when full.

    transformers' DynamicLayer concatenates at every step, which copies the whole cache for each token; here a
    step writes its own positions only, and crop moves an index. Shapes are those of DynamicLayer:
    keys and values [B, heads, length, head_dim].
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take dtype, device and shapes from the first keys and values."""
        super().lazy_initialization(key_states, value_states)
        self._length = 0
        self._buffers = (_empty(key_states, 0), _empty(value_states, 0))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append S positions (each [B, heads, S, head_dim]) and return all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, stop = self._length, self._length + key_states.shape[-2]
        if stop > self._buffers[0].shape[-2]:
            self._buffers = (self._grown(0, key_states, stop), self._grown(1, value_states, stop))
        self._buffers[0][:, :, start:stop] = key_states
        self._buffers[1][:, :, start:stop] = value_states
        self._show(stop)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -tokens_to_remove positions (the sign is transformers' own)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count, found a positive one: {tokens_to_remove}")
        if self.is_initialized and tokens_to_remove:
            self._show(max(self._length + tokens_to_remove, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        if self.is_initialized:
            self._buffers = (self._buffers[0][indices], self._buffers[1][indices])
            self._show(self._length)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take these rows of the batch."""
        self.batch_select_indices(beam_idx)

    def _show(self, length: int) -> None:
        self._length = length
        self.keys = self._buffers[0][:, :, :length]
        self.values = self._buffers[1][:, :, :length]

    def _grown(self, index: int, states: torch.Tensor, length: int) -> torch.Tensor:
        old = self._buffers[index]
        new = _empty(states, max(length + _BLOCK, 2 * old.shape[-2]))
        new[:, :, : self._length] = old[:, :, : self._length]
        return new


def _empty(states: torch.Tensor, length: int) -> torch.Tensor:
    B, heads, _, width = states.shape
    return states.new_empty(B, heads, length, width)


def make_cache(config: PretrainedConfig) -> DynamicCache:
    """A cache for a model of this configuration; layers of special kinds (sliding windows) stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class Memory:
    """A model with what it remembers of the tokens that it has read.

    Args:
        model: in most families it is given a cache; a few make their own, and some keep a part in their layers.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._names = inspect.signature(model.forward).parameters
        self._makes_its_own = not getattr(model, "_supports_default_dynamic_cache", lambda: True)()
        name = "cache_params" if "cache_params" in self._names else "past_key_values"
        self._given: dict[str, Any] = {} if self._makes_its_own else {name: make_cache(model.config)}

    def forward(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """Logits behind ids [B, S], which follow what was read; options that the model does not know are left out."""
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

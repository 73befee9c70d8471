"""The base's hidden states, and the lengths to which sequences are padded."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from spec.base.limits import limits_of, positions_of

BUCKET = 64
"""Sequences are padded to a multiple of this: a bf16 result depends on the padded length, so it must follow from
the sequence alone and never from what shares its batch."""


def bucket(length: int) -> int:
    """The padded length of a sequence of `length` tokens."""
    return -(-length // BUCKET) * BUCKET


def prompt_bucket(length: int) -> int:
    """The padded length of a prompt to be answered: a power of two, so that rare long prompts share a batch.

    A batch costs nearly the same for few rows as for many while it writes, and padding costs only its prefill.
    """
    return max(BUCKET, 1 << (length - 1).bit_length())


def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """States after the final norm, [B, S, d], of right-padded ids [B, S].

    Every layer is causal, so that padding on the right changes no state of a real token. Padding beyond the last
    position that the model has is not read: its states are NaN.
    """
    length = ids.shape[1]
    made_for = positions_of(model.config) or length
    most = length if length <= made_for else limits_of(model).most or length
    decoder = model.get_decoder()
    if hasattr(decoder, "lm_head"):  # a whole language model within a model of images (Llama 4)
        decoder = decoder.model
    states: torch.Tensor = decoder(input_ids=ids[:, :most], use_cache=False).last_hidden_state
    return states if length <= most else F.pad(states, (0, 0, 0, length - most), value=torch.nan)

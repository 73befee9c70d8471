"""EAGLE-3 trained by the vLLM project's own trainer: its model, loss, packing, gradient clipping and optimizer.

    python3 -m venv build/speculators   # an environment of its own: it wants transformers 5.19
    build/speculators/bin/pip install --editable . torch==2.13.0 speculators==0.9.0
    build/speculators/bin/pip uninstall --yes torchvision torchaudio   # which fail next to torch's CPU build
    build/speculators/bin/python -m bench.train eagle3

A CPU needs attention by sdpa, as flex_attention has no backward pass there; the eager losses, as the fused ones are
written in Triton; and the steps of its Trainer in `step`, as that one moves the model to an accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from speculators.models.eagle3 import Eagle3DraftModel
from speculators.models.eagle3.data import shift_batch
from speculators.train.cli import create_transformer_layer_config
from speculators.train.data import CollateFn
from speculators.train.optimizers import build_optimizers
from speculators.train.trainer import TrainerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from bench.public_eagle3 import at_all_tokens
from bench.recipes import Recipe
from spec.config import Config
from spec.heads import Packed
from spec.heads.eagle3 import Eagle3
from spec.store.reader import FeatureReader
from spec.workers import Worker

DECAY = 0.8
"""Of the loss with the depth, as in Eagle3Params.head_weights."""


def recipe(
    config: Config,
    speculator: Eagle3,
    reader: FeatureReader,
    parts: Sequence[Sequence[int]],
    worker: Worker,
    base: Path,
    frozen: bool,
) -> Recipe:
    """Begins with the weights of `speculator`. `frozen`: lm_head stays the base's, as it does there by default."""
    n, device, optim = speculator.config.n_predict, worker.device, config.optim
    dtype = torch.bfloat16 if worker.mixed(config.model.dtype) else torch.float32
    head = same_head(speculator, base).to(device)
    head.lm_head.requires_grad_(not frozen)
    asked = {"loss_fn": "kl_div", "loss_implementation": "eager", "ttt_steps": n, "ttt_step_loss_decay": DECAY}
    given, _ = head.get_trainer_kwargs(**asked)
    [optimizer] = build_optimizers(head, TrainerConfig(optim.lr, 1, "", weight_decay=optim.weight_decay))
    batches = [(len(packed.starts), collated(speculator, packed, dtype)) for packed in reader.batches(parts)]

    def step(number: int) -> tuple[int, float]:
        positions, batch = batches[number]
        with torch.autocast(device.type, dtype=dtype):
            _, loss, _ = head(**{name: tensor.to(device) for name, tensor in batch.items()}, **given)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        return positions, float(loss.detach()) / sum(DECAY**k for k in range(n))  # there the sum over the depths

    return Recipe(optimizer, step)


def same_head(speculator: Eagle3, base: Path) -> Any:
    """The speculator as a model of that package; `base` is the folder of the base."""
    config, token_map = speculator.config, speculator.token_map
    drafted = shifts = None
    if token_map is not None:
        drafted = torch.zeros(config.vocab_size, dtype=torch.bool)
        drafted[token_map] = True
        shifts = token_map - torch.arange(len(token_map))
    head = Eagle3DraftModel.from_training_args(
        create_transformer_layer_config(str(base), 1, "llama", None, 2048, full_attention_indices=[0]),
        drafted,
        shifts,
        verifier_name_or_path=str(base),
        draft_vocab_size=config.head_rows,
        target_layer_ids=[tap.layer for tap in speculator.taps[:-1]],
        ttt_steps=config.n_predict,
        norm_before_residual=False,
        norm_output=config.norm_output,
        draft_attn_impl="sdpa",
    )
    head.verifier_norm = nn.Identity()  # the cached last states have been through the base's norm
    weights = {name.replace("midlayer.", "layers.0."): weight for name, weight in speculator.state_dict().items()}
    own = {name: weights.get(name, value) for name, value in head.state_dict().items()}
    head.load_state_dict(own)
    return head


def collated(speculator: Eagle3, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
    """Sequences as packed there, without padding. A token counts where the next one, which it foretells, does."""
    read, last = at_all_tokens(speculator, packed)
    foretells = packed.mask & F.pad(packed.mask, (0, 1))[1:]
    foretells[[end - 1 for end in packed.offsets[1:]]] = False
    samples = [
        {
            "input_ids": packed.ids[start:end],
            "hidden_states": read[start:end],
            "verifier_last_hidden_states": last[start:end],
            "loss_mask": foretells[start:end],
            "lengths": torch.tensor([end - start]),
            "position_ids": torch.arange(end - start),
        }
        for start, end in pairwise(packed.offsets)
    ]
    length = len(packed.ids) - len(samples)
    collate = CollateFn(length, last.shape[1], len(speculator.taps) - 1, dtype, preprocess=shift_batch)
    return {name: value for name, value in collate(samples).items() if isinstance(value, Tensor)}

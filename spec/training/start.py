"""What training starts from: the network that the parameters ask for, and its first weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spec import heads
from spec.config import Config
from spec.errors import SpecError
from spec.heads import Layer, OnBase, Params, Speculator, SpeculatorConfig
from spec.store.manifest import Manifest


def shape_on(params: Params, manifest: Manifest) -> SpeculatorConfig:
    """The network that params ask for, on the base that the features come from."""
    base = OnBase(
        hidden_size=manifest.hidden_size,
        vocab_size=manifest.vocab_size,
        base_model_name_or_path=manifest.base["name"],
        base_digest=manifest.base["weights"],
        base_revision=manifest.base["revision"],
        layers=manifest.layers,
    )
    return heads.on_base(params, base, None if manifest.layer is None else Layer(**manifest.layer))


def initialise(
    config: Config, shape: SpeculatorConfig, counts: NDArray[np.int64], tables: Mapping[str, Tensor]
) -> Speculator:
    """A speculator with its first weights: random, the base's tables, or an earlier checkpoint's.

    `counts` [V] says how often each token is supervised: the draft vocabulary is the most frequent ones, of which ties
    go to the lower id. `tables` has the base's "embedding" and "lm_head", where they are needed.
    """
    init, seed = config.model.speculator.init, config.trainer.seed
    if init not in ("random", "base"):
        return _warm(Path(init), shape, tables)
    token_map = None
    if shape.draft_vocab_size is not None:
        token_map = torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[: shape.draft_vocab_size]))
    speculator = heads.build(shape, token_map)
    speculator.initialise(tables if init == "base" else None, seed)
    speculator.lend(tables)
    return speculator


def _warm(folder: Path, shape: SpeculatorConfig, tables: Mapping[str, Tensor]) -> Speculator:
    if not folder.is_dir():
        raise SpecError(f'model.speculator.init: {str(folder)!r} is neither "random", "base" nor a checkpoint folder')
    try:
        saved = heads.load(folder, dtype=torch.float32, tables=tables)
        heads.check_base(saved.config, shape.vocab_size, shape.hidden_size, "", allow_other_weights=True)
    except (heads.CheckpointError, OSError) as error:
        raise SpecError(f"model.speculator.init: {error}") from None
    params = heads.method(shape.method).Params.model_fields
    read, wanted = saved.config.taps(saved.config.layers), shape.taps(shape.layers)
    if read != wanted:
        layers = [[tap.layer for tap in taps if tap.layer is not None] for taps in (read, wanted)]
        raise SpecError(
            f"model.speculator.init: {folder} reads the layers {layers[0]}, and the parameters ask for {layers[1]}"
        )
    for name in [name for name in params if name not in shape.free]:
        found, asked = getattr(saved.config, name, None), getattr(shape, name)
        if found != asked:
            raise SpecError(f"model.speculator.init: {folder} has {name} {found}, and the parameters ask for {asked}")
    # A public head's layer is its own; what drafting uses besides the heads is made anew.
    own = type(shape).model_fields.keys() - params - OnBase.model_fields.keys() - {"lookup", "mixer"}
    saved.config = shape.model_copy(update={name: getattr(saved.config, name) for name in own})
    return saved

"""Medusa heads for unmodified vLLM (vllm/model_executor/models/medusa.py, transformers_utils/configs/medusa.py).

The tensors keep their names. With tie_weights the heads share one output matrix (``original_lm_head``); it may have the
rows of a draft vocabulary, whose full ids are in ``token_map``.

vLLM takes any config key with "num" and "heads" in it for the number of heads, and "num" and "layers" for that of
layers: no other such key may stand in config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spec.export.format import ExportError, Format, flag, number, vllm_command
from spec.heads import CheckpointError, SpeculatorConfig


class VllmMedusa(Format):
    """See the module."""

    name = "vllm-medusa"

    def check(self, config: SpeculatorConfig) -> None:
        """See Format."""
        if config.method != "medusa":
            raise ExportError(
                f"format {self.name} holds medusa heads, and this speculator's method is {config.method}: formats "
                "arctic and ibm-fms hold recurrent heads; for unmodified vLLM train with "
                "model.speculator.method=medusa"
            )
        if config.draft_vocab_size is not None and not config.tie_weights:
            raise ExportError(
                f"format {self.name}: vLLM gives heads with an output matrix of their own the whole vocabulary, and "
                f"these have {config.draft_vocab_size} of {config.vocab_size} rows. Train with "
                "model.speculator.tie_weights=true, or with model.speculator.draft_vocab_size=null"
            )

    def config(self, config: SpeculatorConfig, base_architectures: Sequence[str]) -> dict[str, Any]:
        """See Format."""
        truncated = {} if config.draft_vocab_size is None else {"truncated_vocab_size": config.draft_vocab_size}
        return {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            **truncated,
            "num_heads": config.n_predict,
            "num_hidden_layers": config.num_hidden_layers,
            "original_lm_head": config.tie_weights,
            "medusa_fc_bias": False,
        }

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """See Format."""
        if flag(values, "medusa_fc_bias"):
            raise CheckpointError("medusa_fc_bias is true: this project's medusa layers have no bias")
        scale = values.get("logit_scale", 1.0)
        if scale != 1.0:
            raise CheckpointError(f"logit_scale is {scale!r}: this project's medusa heads have no scale")
        d = number(values, "hidden_size")
        truncated = values.get("truncated_vocab_size")
        return {
            "method": "medusa",
            "hidden_size": d,
            "vocab_size": number(values, "vocab_size"),
            "n_predict": number(values, "num_heads"),
            "num_hidden_layers": number({"num_hidden_layers": 1, **values}, "num_hidden_layers"),
            "tie_weights": flag(values, "original_lm_head"),
            "draft_vocab_size": None if truncated is None else number(values, "truncated_vocab_size"),
            **dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), (d,)),  # which medusa does not read
        }

    def serve(self, config: SpeculatorConfig, folder: Path, base_architectures: Sequence[str]) -> str:
        """See Format."""
        # vLLM (0.32) makes token_map a parameter while it loads, then misses it among the parameters to be loaded.
        options = (
            {} if config.draft_vocab_size is None else {"model-loader-extra-config": {"enable_weights_track": False}}
        )
        return vllm_command(config, folder, "medusa", options=options)

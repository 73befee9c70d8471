"""MLP speculators in the layout of IBM's public ones (fms_extras/models/hf/modeling_mlp_speculator.py).

TGI, fms-extras and vLLM's V0 engine read it. ``emb_dim`` is the base's hidden size there, and ``inner_dim`` the one
width of the speculator.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spec.export.format import (
    ExportError,
    Format,
    equal_width,
    flag,
    no_draft_vocabulary,
    number,
    single_width,
    vllm_command,
)
from spec.heads import SpeculatorConfig


class IbmFms(Format):
    """See the module."""

    name = "ibm-fms"
    prefix = "speculator."

    def check(self, config: SpeculatorConfig) -> None:
        """See Format."""
        if config.method != "sum_rnn":
            fits = "arctic" if config.method == "sum_lstm" else "vllm-medusa"
            raise ExportError(
                f"format {self.name} holds sum_rnn, and this speculator's method is {config.method}: format {fits} "
                "holds it"
            )
        equal_width(config, self.name)
        no_draft_vocabulary(config, self.name)
        if config.tie_weights and config.n_predict == 1:
            raise ExportError(
                f"format {self.name}: the public class refuses tied weights of a single head. Train with "
                "model.speculator.tie_weights=false or more heads"
            )

    def config(self, config: SpeculatorConfig, base_architectures: Sequence[str]) -> dict[str, Any]:
        """See Format."""
        n = config.n_predict
        return {
            "architectures": ["MLPSpeculatorPreTrainedModel"],
            "model_type": "mlp_speculator",
            "emb_dim": config.hidden_size,
            "inner_dim": equal_width(config, self.name),
            "vocab_size": config.vocab_size,
            "n_predict": n,
            "n_candidates": n,
            "top_k_tokens_per_head": [1] * n,
            "tie_weights": config.tie_weights,
            "scale_input": config.scale_input,
            # vLLM derives a head size from the config and divides by this (vllm#34106).
            "num_attention_heads": 1,
        }

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """See Format."""
        d = number(values, "emb_dim")
        width = d if values.get("inner_dim", 0) == 0 else single_width(values, "inner_dim")
        return {
            "method": "sum_rnn",
            "hidden_size": d,
            "vocab_size": number(values, "vocab_size"),
            "n_predict": number(values, "n_predict"),
            **dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), (width,)),
            "tie_weights": flag(values, "tie_weights"),
            "scale_input": flag(values, "scale_input"),
        }

    def key(self, name: str) -> str:
        """See Format: emb.0.0.weight is emb.0.weight there."""
        return re.sub(r"^(emb|proj|ln)\.(\d+)\.0\.", r"\1.\2.", name)

    def name_of(self, key: str) -> str:
        """See Format."""
        return re.sub(r"^(emb|proj|ln)\.(\d+)\.(weight|bias)$", r"\1.\2.0.\3", key)

    def serve(self, config: SpeculatorConfig, folder: Path, base_architectures: Sequence[str]) -> str:
        """See Format: TGI finds the base by config.json; its class for untied heads fails when it is built."""
        if config.tie_weights:
            return f"text-generation-launcher --model-id {shlex.quote(str(folder))}"
        return vllm_command(config, folder, "mlp_speculator", "VLLM_USE_V1=0 ")

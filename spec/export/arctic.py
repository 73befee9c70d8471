"""Recurrent heads for ArcticInference's LSTM class (arctic_inference/vllm/spec_dec/arctic_speculator.py).

Despite its name the class serves sum_rnn and sum_lstm. The tensors keep their names, which are ArcticTraining's
(projects/arctic_lstm_speculator). The engine fuses the gates' projections itself, and only where the four gates share
their embedding. It compares the base's architecture with ``base_model_archs``, unless an environment variable says not
to.
"""

from __future__ import annotations

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
from spec.heads import CheckpointError, SpeculatorConfig


class Arctic(Format):
    """See the module."""

    name = "arctic"

    def check(self, config: SpeculatorConfig) -> None:
        """See Format."""
        if config.method == "medusa":
            raise ExportError(
                f"format {self.name} holds sum_rnn and sum_lstm, and this speculator's method is medusa: format "
                "vllm-medusa holds it"
            )
        equal_width(config, self.name)
        no_draft_vocabulary(config, self.name)
        if config.method == "sum_lstm" and not config.tie_lstm_embs:
            raise ExportError(
                f"format {self.name}: ArcticInference serves a sum_lstm only where its gates share one embedding. "
                "Train with model.speculator.tie_lstm_embs=true"
            )

    def config(self, config: SpeculatorConfig, base_architectures: Sequence[str]) -> dict[str, Any]:
        """See Format."""
        n, width = config.n_predict, str(equal_width(config, self.name))
        return {
            "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"],
            "model_type": "mlp_speculator",
            **({"base_model_archs": list(base_architectures)} if base_architectures else {}),
            "method": config.method,
            "input_hidden_dim": config.hidden_size,
            "inner_dim": width,
            "emb_dim": width,
            "proj_dim": width,
            "vocab_size": config.vocab_size,
            "n_predict": n,
            "n_candidates": n,
            "top_k_tokens_per_head": [1] * n,
            "tie_weights": config.tie_weights,
            "tie_lstm_embs": config.tie_lstm_embs,
            "scale_input": config.scale_input,
            # vLLM derives a head size from the config and divides by this (vllm#34106).
            "num_attention_heads": 1,
        }

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """See Format."""
        method = values.get("method", "sum_rnn")
        if method not in ("sum_rnn", "sum_lstm"):
            raise CheckpointError(f"method is {method!r}, expected sum_rnn or sum_lstm")
        widths = {name: single_width(values, name) for name in ("inner_dim", "emb_dim", "proj_dim")}
        if len(set(widths.values())) > 1:
            raise CheckpointError(f"{widths}: the public network has one width for the three")
        return {
            "method": method,
            "hidden_size": number(values, "input_hidden_dim"),
            "vocab_size": number(values, "vocab_size"),
            "n_predict": number(values, "n_predict"),
            **{name: (width,) for name, width in widths.items()},
            "tie_weights": flag(values, "tie_weights"),
            "tie_lstm_embs": flag(values, "tie_lstm_embs"),
            "scale_input": flag(values, "scale_input"),
        }

    def serve(self, config: SpeculatorConfig, folder: Path, base_architectures: Sequence[str]) -> str:
        """See Format."""
        environment = "ARCTIC_INFERENCE_ENABLED=1 "
        if not base_architectures:
            environment += "ARCTIC_INFERENCE_SKIP_SPEC_MODEL_CHECK=1 "
        return vllm_command(config, folder, "arctic", environment)

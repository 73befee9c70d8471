"""Recurrent heads for ArcticInference's LSTM class (arctic_inference/vllm/spec_dec/arctic_speculator.py).

Despite its name the class serves sum_rnn and sum_lstm. The tensors keep their names, which are ArcticTraining's
(projects/arctic_lstm_speculator). The engine fuses the gates' projections itself, and only where the four gates share
their embedding. It compares the base's architecture with ``base_model_archs``, unless an environment variable says not
to.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spec.export.format import ExportError, Format
from spec.heads import SpeculatorConfig, SumLstmConfig, SumRnnConfig

HeldConfig = SumRnnConfig | SumLstmConfig
"""Those of the methods that the format holds."""


def check(config: SpeculatorConfig) -> HeldConfig:
    """The config, where the format can hold it: it has two methods, one width for all, and the whole vocabulary.

    Raises:
        ExportError: the reason, and what would fit.
    """
    if not isinstance(config, HeldConfig):
        raise ExportError(
            f"format arctic holds sum_rnn and sum_lstm, and this speculator's method is {config.method}: "
            "ArcticInference has no class for it; the format vllm holds eagle3"
        )
    dims = {key: getattr(config, key) for key in ("inner_dim", "emb_dim", "proj_dim")}
    found = ", ".join(f"{key} {'.'.join(map(str, value))}" for key, value in dims.items())
    if any(len(value) > 1 for value in dims.values()):
        raise ExportError(
            f"format arctic holds no stack of widths (found {found}): from such a list the engine builds another "
            "network than the trained one. One integer for all three widths fits"
        )
    if len(set(dims.values())) > 1:
        raise ExportError(
            f"format arctic has one width for embedding, projection and output (found {found}): the engine "
            "adds and normalises them as they are. Train with the three widths equal"
        )
    if config.draft_vocab_size is not None:
        raise ExportError(
            f"format arctic has no draft vocabulary: the engine takes the row number of a head's output as "
            f"the token, but this speculator's {config.draft_vocab_size} rows stand for other tokens. Train with "
            "model.speculator.draft_vocab_size=null"
        )
    if isinstance(config, SumLstmConfig) and not config.tie_lstm_embs:
        raise ExportError(
            "format arctic: ArcticInference serves a sum_lstm only if its gates share one embedding. "
            "Train with model.speculator.tie_lstm_embs=true"
        )
    return config


def describe(config: SpeculatorConfig) -> str:
    """The number of heads and their width."""
    held = check(config)
    heads = f"{held.n_predict} head{'s' if held.n_predict > 1 else ''}"
    return f"{heads}, width {held.head_width}, {'tied' if held.tie_weights else 'untied'} weights"


def engine_config(config: SpeculatorConfig, base_architectures: Sequence[str]) -> dict[str, Any]:
    """What the engine reads in config.json."""
    config = check(config)
    n = config.n_predict
    return {
        "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        **({"base_model_archs": list(base_architectures)} if base_architectures else {}),
        "method": config.method,
        "input_hidden_dim": config.hidden_size,
        **dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), str(config.inner_dim[0])),
        "vocab_size": config.vocab_size,
        "n_predict": n,
        "n_candidates": n,
        "top_k_tokens_per_head": [1] * n,
        "tie_weights": config.tie_weights,
        "tie_lstm_embs": isinstance(config, SumLstmConfig),  # as check accepts it
        "scale_input": config.scale_input,
        # vLLM derives a head size from the config and divides by this (vllm#34106).
        "num_attention_heads": 1,
    }


def command(config: SpeculatorConfig, folder: Path, base_architectures: Sequence[str]) -> str:
    """The shell command that serves the base with the export in a folder."""
    environment = "ARCTIC_INFERENCE_ENABLED=1 "
    if not base_architectures:
        environment += "ARCTIC_INFERENCE_SKIP_SPEC_MODEL_CHECK=1 "
    model = shlex.quote(config.base_model_name_or_path)
    revision = f" --revision {shlex.quote(config.base_revision)}" if config.base_revision else ""
    speculative = {"method": "arctic", "model": str(folder), "num_speculative_tokens": config.n_predict}
    return (
        f"{environment}vllm serve {model}{revision} \\\n    --speculative-config {shlex.quote(json.dumps(speculative))}"
    )


ARCTIC = Format("arctic", check, describe, engine_config, lambda config, weights: dict(weights), command)

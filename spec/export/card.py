"""The model card of an export: what it is, what it was trained on, how to serve it, what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spec.export.format import Format
from spec.heads import SpeculatorConfig

MARK = "<!-- written by spec export -->"
"""Tells an export from another folder that holds a model."""


@dataclass(frozen=True)
class Measured:
    """What is known of a checkpoint from the runs that made it."""

    features: str | None = None  # digest of the features that it was trained on (Manifest.digest)
    figures: Mapping[str, Any] | None = None  # results/evaluate/details.json


def text(
    form: Format,
    config: SpeculatorConfig,
    parameters: int,
    dtype: torch.dtype,
    digest: str,
    command: str,
    measured: Measured,
) -> str:
    """The card, in Markdown.

    `parameters` is their number, `dtype` that of the exported weights, `digest` the SHA-256 of the pytorch_model.bin
    that was exported, and `command` what serves the export.
    """
    base = f"`{config.base_model_name_or_path}`"
    if config.base_revision:
        base += f", revision `{config.base_revision}`"
    drafted = f"all {config.vocab_size:,}" if config.draft_vocab_size is None else f"{config.draft_vocab_size:,}"
    rows = {
        "base": base,
        "weights of the base": f"`{config.base_digest}`" if config.base_digest else "not known",
        "method": f"{config.method}, {form.describe(config)}",
        "drafts from": f"{drafted} tokens",
        "size": f"{parameters / 1e6:.1f} M parameters, {str(dtype).removeprefix('torch.')}",
        "trained on": f"features `{measured.features}`" if measured.features else "not known",
        "exported from": f"pytorch_model.bin `{digest}`",
    }
    return "\n".join(
        [
            "---",
            "tags: [speculative-decoding]",
            *([f"base_model: {config.base_model_name_or_path}"] if config.base_revision else []),
            "---",
            MARK,
            "",
            f"# Speculator for {config.base_model_name_or_path}",
            "",
            f"It drafts tokens for speculative decoding, and serves this base alone. The format is `{form.name}`; it "
            f"was trained to draft {config.n_predict} tokens.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            "Digests are SHA-256: of the base's weight files and config.json together, of the features (token ids, "
            "loss masks and the base's states of all training sequences), and of the checkpoint's file.",
            "",
            "## Serve",
            "",
            "```bash",
            command,
            "```",
            "",
            "## Measured",
            "",
            *_figures(measured.figures),
            "",
        ]
    )


def _figures(figures: Mapping[str, Any] | None) -> list[str]:
    """The evaluation's table; its figures are of the checkpoint before export, in this project's own decoding."""
    if figures is None:
        return ["Not measured: no evaluation of these weights was found next to the checkpoint."]
    offline, decode = figures["offline"], figures["decode"]
    acceptance = " ".join(f"{share:.2f}" for share in offline["acceptance"].values())
    lines = [
        "On held-out prompts, with the checkpoint before export and this project's own decoding; an engine's figures "
        "will differ. Tokens per step count the base's own token: plain decoding has 1.0.",
        "",
        "| domain | tokens per step | n-gram lookup, no training |",
        "|---|---|---|",
        *(
            f"| {name} | {row['tokens_per_step']:.2f} | {row['ngram_tokens_per_step']:.2f} |"
            for name, row in figures["domains"].items()
        ),
        f"| all | {offline['tokens_per_step']:.2f} | {figures['ngram']['tokens_per_step']:.2f} |",
        "",
        f"- 95 % interval {offline['tokens_per_step_low']:.2f} to {offline['tokens_per_step_high']:.2f} over "
        f"{offline['answers']} answers; acceptance by position {acceptance}",
    ]
    if offline["written_by_base"] < 1:
        share = 1 - offline["written_by_base"]
        lines.append(f"- {share:.0%} of the answers were not written greedily by the base, so decoding will differ")
    if decode["speedup"]:
        lines.append(
            f"- {decode['speedup']:.2f} times as fast as plain decoding, drafting by `{decode['draft']}` (wall clock, "
            f"{decode['prompts']} prompts, one at a time)"
        )
    if decode["lossless"] is not None:
        lines.append(f"- identical to plain greedy decoding in float32: {'yes' if decode['lossless'] else 'no'}")
    return lines

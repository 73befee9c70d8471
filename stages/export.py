"""export: write a speculator in the format of a serving engine."""

from pathlib import Path
from typing import get_args

import click

from spec.config import Dtype
from stages import common


@click.command()
@click.option("--format", "form", type=click.Choice(["arctic", "vllm"]), default=None, help="[default: by the method]")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder to write.")
@click.option("--checkpoint", type=click.Path(path_type=Path), default=common.MODEL, show_default=True)
@click.option("--dtype", type=click.Choice(get_args(Dtype)), default="bfloat16", show_default=True)
@click.option("--base", default=None, help="The base's name for the engine, if not the checkpoint's.")
def export(form: str | None, out: Path, checkpoint: Path, dtype: str, base: str | None) -> None:
    """Write a speculator for a serving engine: weights, config.json and a card.

    arctic: sum_rnn and sum_lstm, for ArcticInference. vllm: eagle3, for vLLM's own method of that name.
    """
    import torch

    from spec import export as exports
    from spec import heads

    with common.clear_errors():
        config = heads.read_config(checkpoint)
        form = form or ("vllm" if config.method == "eagle3" else "arctic")
        where = (config.base_model_name_or_path, config.base_revision) if base is None else (base, None)
        written = exports.write(
            checkpoint,
            out,
            getattr(torch, dtype),
            form=exports.FORMATS[form],
            base=base,
            base_architectures=exports.read_architectures(*where),
            measured=exports.measured_on(checkpoint),
        )
    common.say(
        f"export: {written.config.method} with {written.config.n_predict} heads as {form}, {dtype} "
        f"({common.size(written.bytes)}) -> {out}\n{written.command}"
    )

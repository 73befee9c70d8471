"""generate: text from the base, sped up by a speculator."""

from pathlib import Path
from typing import Any, get_args

import click

from spec.config import Dtype
from spec.drafting import Source
from stages import common

SHOWN = 8
"""Drafted positions whose acceptance the last line shows; an n-gram's draft may be longer."""


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), default=common.MODEL, show_default=True)
@click.option("--prompt", required=True, help="What to ask; the base's chat template is put around it.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--draft", type=click.Choice(get_args(Source)), default="hybrid", show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, default=None, help="Seed of the sampling.")
@click.option("--dtype", type=click.Choice(get_args(Dtype)), default="bfloat16", show_default=True)
@click.option("--base", default=None, help="The base, if it is not where the checkpoint says.")
@click.option("--trust-remote-code", is_flag=True, help="Run code from the base's folder.")
def generate(
    checkpoint: Path, prompt: str, max_new_tokens: int, draft: Source, temperature: float, seed: int | None, **base: Any
) -> None:
    """Answer a prompt with a base and its speculator: stream the text, and say how fast it was."""
    from transformers import TextStreamer

    from spec import corpus
    from spec.decoding import LanguageModelWithSpeculator

    with common.clear_errors():
        model = LanguageModelWithSpeculator.from_pretrained(checkpoint, **base)
        tokenizer = model.base.tokenizer
        corpus.install_plain_template(tokenizer)
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        result = model.generate(
            ids,
            max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            seed=seed,
            draft=draft,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    rates = " ".join(f"{rate:.2f}" for rate in result.acceptance_rates[:SHOWN]) or "-"
    click.echo(
        f"{len(result.tokens)} tokens, {result.tokens_per_second:.1f} tokens/s, {result.tokens_per_step:.2f} tokens "
        f"per step, acceptance by position {rates}",
        err=True,
    )

"""serve: vLLM's OpenAI-compatible server with a base and its speculator."""

import os
from pathlib import Path
from typing import Any, get_args

import click

from spec.config import Decode, DraftSource, Dtype
from stages import common


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--checkpoint", type=click.Path(path_type=Path), default=common.MODEL, show_default=True)
@click.option("--draft", type=click.Choice(get_args(DraftSource)), default=None, help="[default: hybrid; eagle3: head]")
@click.option("--draft-len", type=click.IntRange(min=1), default=None, help="Drafts a step. [default: n_predict or 8]")
@click.option("--dtype", type=click.Choice(["auto", *get_args(Dtype)]), default="auto", show_default=True)
@click.option("--base", default=None, help="The base, if it is not where the checkpoint says.")
@click.option("--trust-remote-code", is_flag=True, help="Run code from the base's folder.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM OPTIONS]")
def serve(checkpoint: Path, draft: DraftSource | None, draft_len: int | None, **options: Any) -> None:
    """Serve a base and its speculator with vLLM's server, in an environment that has vLLM."""
    from spec.serving import bound_cpu_memory, server

    with common.clear_errors():
        decode = Decode(draft_len=draft_len) if draft is None else Decode(draft=draft, draft_len=draft_len)
        command = server.command(checkpoint, decode, **options)
    bound_cpu_memory()
    os.execv(command[0], command)

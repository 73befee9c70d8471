"""The console command `spec`."""

from __future__ import annotations

import importlib
import keyword
from typing import Any

import click

GROUPS = {
    "Stages": {
        "fetch": "find or download base and data, and check them",
        "tokenize": "turn parquet rows into token ids with a loss mask",
        "respond": "let the base write the answers",
        "cache": "run the base once, and store its hidden states",
        "train": "train the heads from the stored states",
        "evaluate": "measure the heads on held-out prompts",
    },
    "Use": {
        "generate": "answer a prompt with base and speculator",
        "serve": "serve both with vLLM",
        "export": "write the format of a serving engine",
        "import": "read a public speculator",
    },
    "Store": {"store": "info, verify, gc, forget, push, pull"},
    "More": {
        "inspect": "show how a data file is read",
        "check": "say whether the base can be used",
        "plan": "say what a run will take",
        "run": "run all stages in a folder of their own (the guide's script)",
        "track": "send finished runs to MLflow (sync)",
    },
}
EXAMPLES = {
    "fetch": "spec fetch -S model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct",
    "tokenize": "spec tokenize -S data.max_samples=100",
    "respond": "spec respond -S respond.batch_size=32",
    "cache": "spec cache -S features.codec=none",
    "train": "spec train -S model.speculator.n_predict=4 -S optim.lr=5e-4",
    "evaluate": "spec evaluate -S evaluate.max_prompts=16",
    "generate": "spec generate --prompt 'How do I clean a kettle?' --max-new-tokens 64",
    "serve": "spec serve --draft head",
    "export": "spec export --format arctic --out exported",
    "import": "spec import ibm-ai-platform/llama3-8b-accelerator imported --base meta-llama/Meta-Llama-3-8B",
    "inspect": "spec inspect /data/chat --split train",
    "check": "spec check -S model.partial_pretrain=/models/mine",
    "plan": "spec plan --base-params 8e9 --hidden 4096 --vocab 128256 --tokens 1e9",
    "run": "spec run --nproc-per-node 2 --save-path speculator data.max_samples=200",
    "store info": "spec store info data/features/train.json",
    "store verify": "spec store verify --dry-run",
    "store gc": "spec store gc --older-than 30 --dry-run",
    "store forget": "spec store forget rows.parquet",
    "store push": "spec store push s3://team/speculators --dry-run",
    "store pull": "spec store pull s3://team/speculators --manifest data/features/train.json",
    "track sync": "spec track sync -S trainer.tracking_uri=http://127.0.0.1:5000",
}
_COMMANDS = [name for commands in GROUPS.values() for name in commands]


class _Lazy(click.Group):
    """Imports a command's module when it is asked for, so that help comes at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return _COMMANDS

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        # A keyword of Python cannot be a module, and `inspect` would hide a module of Python's own.
        module = f"{name}_" if keyword.iskeyword(name) or name == "inspect" else name
        command: Any = getattr(importlib.import_module(f"stages.{module}"), module)
        assert isinstance(command, click.Command)
        parts = command.commands if isinstance(command, click.Group) else {}
        for path, each in {name: command, **{f"{name} {part}": each for part, each in parts.items()}}.items():
            if path in EXAMPLES:
                each.epilog = f"Example: {EXAMPLES[path]}"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl(list(commands.items()))


@click.command(cls=_Lazy)
def main() -> None:
    """Train speculators from a cache of a frozen language model's hidden states.

    `dvc repro` runs the stages whose inputs changed, in this order.
    """


if __name__ == "__main__":
    main()

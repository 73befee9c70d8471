"""The console command `spec`: every stage, and generate."""

from __future__ import annotations

import importlib.util
import keyword
from pathlib import Path
from typing import Any

import click

_COMMANDS = (
    "fetch",
    "check",
    "tokenize",
    "respond",
    "cache",
    "train",
    "evaluate",
    "run",
    "generate",
    "serve",
    "plan",
    "inspect",
    "store",
    "track",
    "export",
    "import",
)


class _Lazy(click.Group):
    """Imports a command's module when it is asked for, so that help comes at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = _module(name)
        command: Any = getattr(importlib.import_module(f"stages.{module}"), module)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _first_line(name)) for name in _COMMANDS])


def _module(name: str) -> str:
    """Of a command's module; a keyword of Python cannot be one, and `inspect` would hide a module of Python's own."""
    return f"{name}_" if keyword.iskeyword(name) or name == "inspect" else name


def _first_line(name: str) -> str:
    spec = importlib.util.find_spec(f"stages.{_module(name)}")
    assert spec is not None
    assert spec.origin is not None
    with Path(spec.origin).open() as file:
        return file.readline().strip().strip('"').partition(": ")[2]


@click.command(cls=_Lazy)
def main() -> None:
    """Train speculators from a cache of a frozen language model's hidden states.

    The stages in their order are fetch, tokenize, respond, cache, train and evaluate; `dvc repro` runs those whose
    inputs changed.
    """


if __name__ == "__main__":
    main()

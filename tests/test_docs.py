"""README.md and docs/: links lead somewhere, commands and parameters exist, pages and tables stay short."""

import re
import shlex
from pathlib import Path

import click
import pytest

from spec import config
from stages.cli import EXAMPLES, GROUPS, main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))

every_page = pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)


def words(path: Path) -> int:
    """Words of a page, code and tables included."""
    return len(re.findall(r"\S*\w\S*", path.read_text()))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(path: Path) -> list[list[str]]:
    """The arguments of every `spec ...` in a page's code, its options and overrides included."""
    text = path.read_text().replace("\\\n", " ")
    found = re.findall(r"^ {4}(spec .*)$", text, re.M) + re.findall(r"`(spec [^`]*)`", text)
    return [shlex.split(re.split(r" && | \| ", line)[0], comments=True)[1:] for line in found]


@every_page
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
            dead.append(link)
    assert dead == []


def found(arguments: list[str]) -> click.Command:
    """The command of these arguments, whose options it takes; `spec STAGE` is any stage."""
    command: click.Command | None = main
    while isinstance(command, click.Group) and arguments and not arguments[0].isupper():
        name, *arguments = arguments
        command = command.get_command(click.Context(command), name)
        assert command is not None, f"spec {name}"
    assert command is not None
    command.make_parser(click.Context(command, **command.context_settings)).parse_args(arguments)
    return command


@every_page
def test_commands_exist_and_take_these_options(page: Path) -> None:
    for arguments in commands(page):
        found(arguments)


def test_every_command_ends_its_help_with_an_example_that_works() -> None:
    names = [name for group in GROUPS.values() for name in group]
    for name in names:
        command = found([name])
        parts = command.commands if isinstance(command, click.Group) else {}
        for path in [f"{name} {part}" for part in parts] or [name]:
            assert EXAMPLES[path].startswith(f"spec {path}")
            command = found(shlex.split(EXAMPLES[path])[1:])
            assert command.get_help(click.Context(command)).endswith(f"Example: {EXAMPLES[path]}".split()[-1])


@every_page
def test_overridden_parameters_exist(page: Path) -> None:
    assert set(re.findall(r"-S '?([a-z_.]+)=", page.read_text())) <= set(config.defaults())


def test_every_parameter_has_its_row() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \|", (ROOT / "docs/parameters.md").read_text(), re.M)
    assert sorted(rows) == sorted(config.defaults())


@every_page
def test_a_table_has_at_most_eight_rows(page: Path) -> None:
    tables = re.findall(r"(?:^\|.*\n)+", page.read_text(), re.M)
    assert page.name == "parameters.md" or max((len(table.splitlines()) - 2 for table in tables), default=0) <= 8


def test_pages_are_short() -> None:
    assert len(README.read_text().splitlines()) <= 130
    assert words(README) <= 1_100
    assert sum(map(words, DOCS)) <= 10_200

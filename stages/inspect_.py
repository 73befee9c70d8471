"""inspect: how a data file or folder is read, in seconds."""

import sys
from collections import Counter
from typing import Any

import click

from spec import base, corpus
from spec.config import Config
from spec.errors import SpecError
from stages import common, embedded

ROWS = 2000


@common.stage
@click.argument("data", nargs=-1, required=True)
@click.option("--split", type=click.Choice(common.SPLITS), help="The split to take where a folder holds several.")
@click.option("--rows", type=click.IntRange(min=1), default=ROWS, show_default=True, help="Read at most this many.")
def inspect_(config: Config, data: tuple[str, ...], split: str | None, rows: int) -> None:
    """Say how DATA (parquet files, folders, globs) is read, and show the first row as the base gets it.

    It reads the first rows of each file with the parameters and the base of params.yaml, as the tokenize stage does,
    and writes nothing. Supervised tokens are green, or in [[ ]] where there is no terminal.
    """
    files = corpus.list_files(data, split=split)
    sources = corpus.inspect(files, **config.reading)
    model = config.model
    folder = embedded.find_base(config)
    tokenizer = base.load_tokenizer(folder, model.trust_remote_code)
    limits = base.limits(folder, model.trust_remote_code).of_rows
    options = {**config.reading, **limits, "date": config.data.date}
    report, first, problems = _read(sources, tokenizer, rows, max_length=config.data.max_length, **options)
    total = corpus.count_rows(sources, None)
    common.say(f"inspect: {len(sources)} files with {total:,} rows; looked at {report.rows:,}")
    *notes, kept = report.lines()
    for line in (*notes, *_turns(report), kept):
        common.say(f"inspect: {line}")
    for row in report.rejected_rows:
        common.say(f"inspect: bad row: {row}")
    if report.rejected and not config.data.skip_bad_rows:
        common.say("inspect: tokenize stops at bad rows; data.skip_bad_rows=true leaves them out")
    if first is not None:
        common.say("inspect: the first row, as the base gets it:")
        common.say(_shown(first, tokenizer))
    if problems:
        raise SpecError("\n".join(problems))


def _read(
    sources: list[corpus.Source], tokenizer: Any, rows: int, **options: Any
) -> tuple[corpus.Report, corpus.TokenSequence | None, list[str]]:
    """Read the first rows of each file; returns the report, the first sequence, and errors by file."""
    report, first, problems = corpus.Report(), None, []
    share = max(1, rows // len(sources))
    for source in sources[:rows]:
        asked = {**options, "max_samples": share, "skip_bad_rows": True, "report": report}
        sequences = corpus.stream([source.path], tokenizer, **asked)
        try:
            for sequence in sequences:
                first = first or sequence
        except corpus.CorpusError as error:
            problems.append(str(error))
    return report, first, problems


def _turns(report: corpus.Report) -> list[str]:
    """Roles and numbers of turns, in words."""
    if not report.roles:
        return []
    roles = ", ".join(f"{role} {count:,}" for role, count in report.roles.most_common())
    lengths = Counter(report.turns).elements()
    shortest, longest = min(report.turns), max(report.turns)
    mean = sum(lengths) / report.turns.total()
    return [f"turns by role: {roles}; {shortest} to {longest} turns a conversation, {mean:.1f} on average"]


def _shown(sequence: corpus.TokenSequence, tokenizer: Any) -> str:
    """A sequence as text, with its supervised tokens marked."""
    parts, end = [], 0
    for start, stop in corpus.spans(sequence.mask):
        supervised = tokenizer.decode(sequence.ids[start:stop])
        parts.append(tokenizer.decode(sequence.ids[end:start]))
        parts.append(click.style(supervised, fg="green") if sys.stdout.isatty() else f"[[{supervised}]]")
        end = stop
    return "".join([*parts, tokenizer.decode(sequence.ids[end:])])

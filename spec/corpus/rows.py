"""The rows of parquet files -> conversations or plain text, one a row. Row numbers count from 0."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spec.corpus.files import domain_of
from spec.corpus.layouts import ROLE_KEYS, Layout, Source
from spec.corpus.sequences import CorpusError
from spec.corpus.turns import Messages, RowError, read_tools, read_turns, written_call

ROWS_PER_READ = 1024


@dataclass(frozen=True)
class Row:
    """One row: plain text, or a conversation whose last message is the assistant's if it has an answer."""

    where: str
    domain: str
    text: str | None
    messages: Messages
    tools: list[dict[str, Any]] = field(default_factory=list)  # the functions that the conversation may call

    @property
    def answered(self) -> bool:
        """Whether the last turn is the assistant's."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for the text, or for the conversation without its last answer."""
        prompt = self.messages[:-1] if self.answered else self.messages
        parts = [self.text, prompt, *([self.tools] if self.tools else [])]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).digest()[:16]


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used."""

    where: str
    reason: str


def read_rows(source: Source, *, need_answers: bool) -> Iterator[Row | Rejected]:
    """The rows of a file, in order, a piece of it in memory at a time.

    A row is rejected for a null or malformed prompt, for an unknown role, or for no answer where one is needed.
    """
    number = 0
    columns = list(dict.fromkeys((*source.layout.read, *source.layout.suspects)))
    try:
        with pq.ParquetFile(source.path) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_READ, columns=columns):
                for values in _records(batch):
                    where = f"{source.path}, row {number}"
                    try:
                        yield _row(values, source, where, need_answers)
                    except RowError as error:
                        yield Rejected(where, str(error))
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{source.path}: cannot be read past row {number} ({error})") from error


def _records(batch: pa.RecordBatch) -> list[dict[str, Any] | RowError]:
    """The rows of a batch; an error in place of one that is not UTF-8."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        return [_record(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _record(batch: pa.RecordBatch) -> dict[str, Any] | RowError:
    values = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column.to_pylist()[0]
        except UnicodeDecodeError:
            return RowError(f"column {name} is not valid UTF-8")
    return values


def _row(values: dict[str, Any] | RowError, source: Source, where: str, need_answers: bool) -> Row:
    if isinstance(values, RowError):
        raise values
    layout = source.layout
    domain = (layout.domain and values[layout.domain]) or domain_of(source.path)
    text = values[layout.prompt] if layout.kind == "text" else None
    if layout.kind == "text" and text is None:
        raise RowError(f"column {layout.prompt} is null")
    messages = [] if layout.kind == "text" else _conversation(values, layout, need_answers)
    tools = read_tools(values[layout.tools], layout.tools) if layout.tools else []
    _check_lost(values, layout, [text, messages, tools], where)
    return Row(where, domain, text, messages, tools)


def _conversation(values: dict[str, Any], layout: Layout, need_answers: bool) -> Messages:
    messages = _with_response(_prompt(values, layout), values, layout)
    messages = _with_system(messages, layout.system and values[layout.system], layout)
    if not messages:
        raise RowError(f"column {layout.prompt} has no messages")
    last = messages[-1]
    answers = last["role"] == "assistant"
    blank = answers and (not (last["content"].strip() or last.get("tool_calls")) or last.get("weight") == 0)
    if need_answers and (blank or not answers):
        state = "of weight 0" if last.get("weight") == 0 else "null or empty"
        what = f"the answer in {layout.response or layout.prompt} is {state}"
        none = "no answer follows the prompt; data.response_key can name a column of answers"
        raise RowError(f"{what if blank else none}; respond.source=base would write one")
    messages = messages[:-1] if blank else messages
    if not messages or messages[0]["role"] == "assistant":
        raise RowError(f"column {layout.prompt} starts with an assistant turn; expected a prompt before it")
    if not any(message["content"].strip() for message in messages if message["role"] != "assistant"):
        raise RowError(f"the prompt in column {layout.prompt} is empty")
    return messages


def _prompt(values: dict[str, Any], layout: Layout) -> Messages:
    prompt = _value(values, layout.prompt)
    if prompt is None:
        raise RowError(f"column {layout.prompt} is null")
    if (messages := read_turns(prompt, layout.prompt)) is not None:
        return messages
    if layout.kind == "messages":
        raise RowError(f"column {layout.prompt} holds text that is not the JSON of a list of turns")
    parts = (prompt, layout.second and values[layout.second])
    return [{"role": "user", "content": "\n\n".join(part for part in parts if part and part.strip())}]


def _with_response(messages: Messages, values: dict[str, Any], layout: Layout) -> Messages:
    if layout.response is None:
        return messages
    response = _value(values, layout.response)
    if isinstance(response, list) and not any(isinstance(item, dict) for item in response):
        response = response[0] if response else None  # every accepted wording of an answer
    turns = None if response is None else read_turns(response, layout.response)
    if turns and turns[0]["role"] != "assistant":
        if not all(message in turns for message in messages):
            raise RowError(f"column {layout.response} holds a conversation that does not begin with {layout.prompt}")
        return turns
    ends = bool(messages) and messages[-1]["role"] == "assistant"
    if ends and response is not None:
        raise RowError(
            f"column {layout.prompt} ends with an assistant turn already, and {layout.response} holds an answer too: "
            "name the one to leave out in data.ignore_columns"
        )
    if turns or ends:
        return [*messages, *(turns or [])]
    calls = written_call(response or "") if layout.tools else {}
    return [*messages, {"role": "assistant", "content": response or "", **calls}]


def _with_system(messages: Messages, system: str | None, layout: Layout) -> Messages:
    if not (system and system.strip()):
        return messages
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() != system.strip():
        raise RowError(
            f"column {layout.prompt} begins with a system turn, and {layout.system} holds another one: name the one to "
            "leave out in data.ignore_columns"
        )
    return messages


def _check_lost(values: dict[str, Any], layout: Layout, read: Any, where: str) -> None:
    """Check that what columns hold that look like a part of the prompt is in the conversation."""
    columns = (*layout.suspects, *((layout.second,) if layout.second else ()))
    found = {column: _texts(values[column], column) for column in columns}
    if not any(found.values()):
        return
    conversation = " ".join(" ".join(_texts(read, layout.prompt)).split())
    for column, texts in found.items():
        for text in texts:
            if " ".join(text.split()) not in conversation:
                raise CorpusError(
                    f"{where}: column {column} looks like a part of the prompt or its answer, and it is not read: "
                    f"{text[:60]!r}. Name the columns to read with data.prompt_key and data.response_key, or leave it "
                    "out with data.ignore_columns"
                )


def _texts(value: Any, column: str) -> list[str]:
    """All text in a value; media stand as their type."""
    if isinstance(value, str):
        turns = read_turns(value, column)
        return [value] if turns is None and value.strip() else _texts(turns, column)
    if isinstance(value, bytes):
        return ["<bytes>"]
    if isinstance(value, dict):
        value = [item for key, item in value.items() if key not in (*ROLE_KEYS, "type")]
    return [text for item in value for text in _texts(item, column)] if isinstance(value, list) else []


def _value(values: dict[str, Any], key: str) -> Any:
    if key in values:
        return values[key]
    value: Any = values
    for part in key.split("."):
        value = value and value[part]
    return value

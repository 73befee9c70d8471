"""The columns of a parquet file -> which of them hold what.

In this order, in lower or upper case:
1. A conversation: `messages`, `conversations`, `conversation` or the like, a list of turns, or text that holds one as
   JSON. A turn is {role, content} or {from, value}; a list may also hold texts, or pairs such as {input, output}.
2. A prompt: `prompt`, `question`, `instruction` or the like, a string or a list of turns, with the answer in the first
   of `answer`, `response`, `output` or the like that holds text or turns; none of them: no answers.
3. `text`, a string: plain text.
data.prompt_key and data.response_key name the columns instead; dots reach into struct columns. Next to either of them
`system` or `system_prompt` is a system turn, `tools` goes to the chat template, and `input` or `context` is the second
part of a prompt. The domain is the column `domain`, else `data_source`, else the file's stem.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from spec.corpus.sequences import CorpusError, columns

CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
AS_JSON = CONVERSATIONS[:3]
"""Those that are taken for a conversation even where they are text."""

PROMPTS = ("prompt", "question", "instruction", "query", "problem", "input", "inputs", "user")
RESPONSES = (  # next to a whole solution, the answer is what comes out of it
    *("solution", "answer", "response", "output", "completion", "chosen", "assistant", "target", "targets", "answers"),
    *("answers.text", "answer.value", "generated_solution", "extra_info.answer"),
)
SYSTEMS = ("system_prompt", "system", "system_message")
SECOND_PARTS = ("input", "inputs", "context")
TOOLS = ("tools", "functions")
DOMAINS = ("domain", "data_source")
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text")
LAYOUTS = (
    f"{', '.join(CONVERSATIONS)} (a list of {{role, content}} or {{from, value}}); {', '.join(PROMPTS)} (a string, or "
    f"such a list) with {', '.join(RESPONSES)}; text (a string)"
)
_ALTERNATIVES = {*CONVERSATIONS, "prompt", "question", "query", "problem"}
"""Whole prompts: where data.prompt_key names one, the others are not read on purpose."""

_PROMPT_WORDS = {
    *("system", "prompt", "prompts", "instruction", "instructions", "input", "inputs", "context", "contexts", "user"),
    *("question", "query", "problem", "choices", "options", "history", "tool", "tools", "function", "functions"),
    *("document", "documents", "passage", "passages", "paragraph", "paragraphs", "article", "story", "table", "schema"),
    *("background", "persona", "image", "images", "video", "videos", "audio", "audios"),
    *("messages", "conversation", "conversations", "dialogue", "dialog", "chat"),
}
_OTHER_WORDS = {
    *("id", "ids", "idx", "index", "type", "types", "len", "length", "tokens", "count", "num", "number", "quality"),
    *("score", "scores", "lang", "language", "config", "configs", "hash", "source", "model", "name", "format"),
    *("formatting", "category", "difficulty", "topic", "split", "version", "url", "date", "level", "style", "label"),
    *("intent", "mask", "use", "used", "call", "calls", "time", "timestamp", "valid"),
}
_NOT_TEXT = {*RESPONSES, "code", "role"}
_Check = Callable[[pa.DataType | None], bool]
_WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


@dataclass(frozen=True)
class Layout:
    """Which columns of a file hold what."""

    kind: Literal["messages", "prompt", "text"]
    prompt: str
    response: str | None = None
    second: str | None = None
    system: str | None = None
    tools: str | None = None
    domain: str | None = None
    suspects: tuple[str, ...] = ()  # look like a part of the prompt: what they hold must be in the conversation
    unused: tuple[str, ...] = ()  # all columns that are not read

    @property
    def read(self) -> tuple[str, ...]:
        """The columns that are read."""
        named = (self.prompt, self.second, self.response, self.system, self.tools, self.domain)
        return tuple(key for key in named if key)

    def __str__(self) -> str:
        """What the stage's log says of a file."""
        what = {"messages": "conversations", "prompt": "prompts", "text": "plain text"}[self.kind]
        second = f" and {self.second}" if self.second else ""
        parts = [f"{what} in {self.prompt}{second}"]
        if self.response or self.kind == "prompt":
            parts.append(f"answers in {self.response}" if self.response else "no answers")
        parts += [f"{name} in {key}" for name, key in (("system turns", self.system), ("tools", self.tools)) if key]
        unused = f"; not read: {', '.join(self.unused)}" if self.unused else ""
        return f"{', '.join(parts)}, domain from {self.domain or 'the file name'}{unused}"


@dataclass(frozen=True)
class Source:
    """A parquet file, its layout and its number of rows."""

    path: Path
    layout: Layout
    rows: int


def inspect(
    files: Sequence[Path],
    *,
    prompt_key: str | None,
    response_key: str | None,
    need_answers: bool,
    ignore_columns: Sequence[str] = (),
) -> list[Source]:
    """Find every file's layout from its schema alone, before any row is read; files without rows are passed over."""
    found = [_inspect(path, prompt_key, response_key, need_answers, ignore_columns) for path in files]
    sources = [source for source in found if source is not None]
    if not sources:
        none = "the file has no rows" if len(files) == 1 else f"none of the {len(files)} files has a row"
        raise CorpusError(f"{files[0]}: {none}")
    return sources


def count_rows(sources: Sequence[Source], max_samples: int | None) -> int:
    """How many rows `stream` will read: the total of its progress."""
    rows = sum(source.rows for source in sources)
    return rows if max_samples is None else min(rows, max_samples)


def _inspect(
    path: Path, prompt_key: str | None, response_key: str | None, need_answers: bool, ignored: Sequence[str]
) -> Source | None:
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error})") from error
    except pa.ArrowException as error:
        pointer = path.stat().st_size < 1024 and b"version https://git-lfs" in path.read_bytes()
        why = "a pointer of Git LFS: git lfs pull downloads the file" if pointer else error
        raise CorpusError(f"{path}: not a readable parquet file ({why})") from error
    if not rows:
        return None
    layout = _Finder(path, schema, frozenset(ignored)).find(prompt_key, response_key)
    if need_answers and layout.kind == "prompt" and layout.response is None and not _holds_json(path, layout.prompt):
        raise CorpusError(
            f"{path}: answers are needed, but no column holds them: found {columns(schema)}, looked for "
            f"{', '.join(RESPONSES)}. Name the column with data.response_key, or let the base write the answers with "
            "respond.source=base"
        )
    return Source(path, layout, rows)


def _holds_json(path: Path, column: str) -> bool:
    """Whether the first text of a column may be the JSON of a conversation, which may end with an answer."""
    with pq.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            return False
        first = next(file.iter_batches(batch_size=1, columns=[column])).column(0).cast(pa.binary())[0].as_py()
    return first is not None and bool(first.lstrip().startswith(b"["))


@dataclass(frozen=True)
class _Finder:
    path: Path
    schema: pa.Schema
    ignored: frozenset[str]

    def find(self, prompt_key: str | None, response_key: str | None) -> Layout:
        """The layout of the columns that are not ignored."""
        if len(set(self.schema.names)) < len(self.schema.names):
            raise CorpusError(f"{self.path}: two columns have the same name: found {columns(self.schema)}")
        prompt = self._prompt(prompt_key, response_key)
        if prompt is None:
            return self._complete(Layout("text", self._column("text")), prompt_key)
        turns = _is_conversation(self._type(prompt)) or prompt.lower() in AS_JSON
        response = second = None
        if response_key is not None:
            response = self._named(response_key, "data.response_key")
        elif prompt_key is not None or prompt.lower() not in CONVERSATIONS:
            response = self._first(RESPONSES, _is_text_or_conversation, prompt)
        if not turns:
            second = self._first(SECOND_PARTS, _is_text, prompt, response)
        return self._complete(Layout("messages" if turns else "prompt", prompt, response, second), prompt_key)

    def _prompt(self, prompt_key: str | None, response_key: str | None) -> str | None:
        """The column of the prompt; None for plain text."""
        if prompt_key is not None:
            return self._named(prompt_key, "data.prompt_key")
        prompt = (
            self._first(CONVERSATIONS, _is_conversation)
            or self._first(AS_JSON, _is_text)
            or self._first(PROMPTS, _is_text_or_conversation)
            or self._first(("chosen",), _is_turns)
            or next((key for key in (*CONVERSATIONS, *PROMPTS) if self._type(key) == pa.null()), None)
        )
        if prompt is None and not (_is_text(self._type(self._column("text"))) and response_key is None):
            raise CorpusError(
                f"{self.path}: no layout fits its columns: found {columns(self.schema)}; a file needs one of: "
                f"{LAYOUTS}. Name the columns with data.prompt_key and data.response_key"
            )
        return prompt

    def _complete(self, layout: Layout, prompt_key: str | None) -> Layout:
        """With the columns that stand next to a prompt, and those that are not read."""
        system = tools = None
        if layout.kind != "text":
            system = self._first(SYSTEMS, _is_text, *layout.read)
            tools = self._first(TOOLS, _is_tools, *layout.read)
        layout = replace(layout, system=system, tools=tools, domain=self._first(DOMAINS, _is_text))
        read = {*layout.read, *(key.split(".")[0] for key in layout.read if key not in self.schema.names)}
        unused = tuple(name for name in self.schema.names if name not in read)
        expected = self.ignored | (_ALTERNATIVES if prompt_key is not None else set())
        suspects = tuple(name for name in unused if name not in expected and self._is_suspect(name, layout.kind))
        return replace(layout, suspects=suspects, unused=unused)

    def _named(self, key: str, param: str) -> str:
        kind = _type(self.schema, key)
        if kind is None:
            raise CorpusError(f"{self.path}: no column {key!r}, which {param} names: found {columns(self.schema)}")
        if not _is_text_or_conversation(kind):
            expected = "a string, a list of strings or a list of {role, content}"
            raise CorpusError(f"{self.path}: column {key!r}, which {param} names, is {kind}; expected {expected}")
        return key

    def _first(self, keys: Iterable[str], fits: _Check, *taken: str | None) -> str | None:
        """The first column that fits, is not all null and not taken."""
        types = {column: self._type(column) for column in map(self._column, keys) if column not in taken}
        return next((column for column, kind in types.items() if fits(kind) and kind != pa.null()), None)

    def _column(self, key: str) -> str:
        """The column with this name, whatever its case."""
        names = self.schema.names
        return key if key in names else next((name for name in names if name.strip().lower() == key), key)

    def _is_suspect(self, name: str, kind: str) -> bool:
        """Whether a column looks like a part of a conversation; next to plain text, answers and roles do too."""
        words = {word.lower() for word in _WORD.findall(name)}
        looks = bool(words & _PROMPT_WORDS) and not words & _OTHER_WORDS
        return (looks or (kind == "text" and name.lower() in _NOT_TEXT)) and _holds_text(self._type(name))

    def _type(self, key: str) -> pa.DataType | None:
        ignored = key in self.ignored or key.split(".")[0] in self.ignored
        return None if ignored else _type(self.schema, key)


def pair(keys: Sequence[str]) -> tuple[str, str] | None:
    """The keys of a question and of its answer, where there are no others."""
    asked, answered = ([key for key in keys if key in known] for known in ((*PROMPTS, "human"), RESPONSES))
    return (asked[0], answered[0]) if len(keys) == 2 and asked and answered else None


def _type(schema: pa.Schema, key: str) -> pa.DataType | None:
    """The type of a column, or of the struct field that a dotted key reaches; None where there is none."""
    if key in schema.names:
        return schema.field(key).type
    name, *path = key.split(".")
    kind = schema.field(name).type if name in schema.names else None
    for part in path:
        kind = _fields(kind).get(part)
    return kind


def _fields(kind: pa.DataType | None) -> dict[str, pa.DataType]:
    return {field.name: field.type for field in kind} if kind is not None and pa.types.is_struct(kind) else {}


def _item(kind: pa.DataType | None) -> pa.DataType | None:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return kind.value_type if kind is not None and any(check(kind) for check in lists) else None


def _is_text(kind: pa.DataType | None) -> bool:
    if kind is None:
        return False
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    # A column of nothing but nulls has the type null: its rows are reported as nulls, not the column as mistyped.
    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def _is_turn(kind: pa.DataType | None) -> bool:
    fields = _fields(kind)
    return any(_is_text(fields.get(key)) for key in ROLE_KEYS) and any(key in fields for key in CONTENT_KEYS)


def _is_turns(kind: pa.DataType | None) -> bool:
    """Whether a column holds a list of turns, or a struct of lists, as some libraries write one."""
    items = {name: _item(field) for name, field in _fields(kind).items()}
    lists = any(_is_text(items.get(key)) for key in ROLE_KEYS) and any(items.get(key) for key in CONTENT_KEYS)
    return _is_turn(_item(kind)) or lists


def _is_conversation(kind: pa.DataType | None) -> bool:
    """Whether a column holds a turn, or a list of turns, of texts or of pairs."""
    texts = _is_text(_item(kind)) and _item(kind) != pa.null()
    return texts or _is_turns(kind) or _is_turn(kind) or pair(list(_fields(_item(kind)))) is not None


def _is_text_or_conversation(kind: pa.DataType | None) -> bool:
    return _is_text(kind) or _is_conversation(kind)


def _is_tools(kind: pa.DataType | None) -> bool:
    return _is_text(kind) or _is_text(_item(kind)) or bool(_fields(_item(kind)))


def _holds_text(kind: pa.DataType | None) -> bool:
    """Whether there may be text or media in a column."""
    if kind is None or kind == pa.null():
        return False
    inside = [*_fields(kind).values(), _item(kind)]
    return kind in (pa.binary(), pa.large_binary()) or _is_text(kind) or any(map(_holds_text, inside))

"""Values of a column -> the turns of a conversation, as chat templates take them: {role, content, ...}."""

import json
import re
from itertools import cycle
from typing import Any

from spec.corpus.layouts import CONTENT_KEYS, PROMPTS, ROLE_KEYS, pair
from spec.corpus.sequences import CorpusError

Messages = list[dict[str, Any]]

ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "chatbot", "ai", "bard", "bing", "claude", "gpt4"),
    "system": ("system", "developer"),
    "tool": ("tool", "function", "observation", "ipython", "tool_response", "function_response", "tool_result"),
    "function_call": ("function_call", "tool_call"),
}
"""The names that data sets have for each role; the text of a function_call is a call of the assistant's."""

_EXPECTED = "user, assistant, system, tool, or a synonym such as human, gpt, model or function_call"
_ROLE = {name: role for role, names in ROLES.items() for name in names}
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_KEYS = ("reasoning", "thinking")
_SPEAKERS = ("user", "assistant")
_NO_TOOLS = ("", "[]", "{}", "null", "None")
_LOOKS_LIKE_TURNS = re.compile(r"\s*\[\s*\{\s*[\"'](role|from|content|value)[\"']")


class RowError(CorpusError):
    """One row that cannot be used; the message is the reason under which such rows are counted."""


def read_turns(value: Any, column: str) -> Messages | None:
    """The turns that a value holds as a list, a struct of lists, a single turn or JSON text; None for other text.

    A list may also hold texts, the user's and the assistant's in turn, or pairs of a question and its answer.
    """
    if isinstance(value, str):
        value = _from_json(value, column)
        if value is None:
            return None
    if isinstance(value, dict):
        lists = {key: items for key, items in value.items() if isinstance(items, list)}
        if any(key in lists for key in ROLE_KEYS):
            value = [dict(zip(lists, items, strict=False)) for items in zip(*lists.values(), strict=False)]
        else:
            value = [value]
    if value and all(isinstance(item, str) for item in value):
        value = _from_texts(value, column)
    return [turn for item in value for turn in _turns(item, f"a turn of column {column}")]


def read_tools(value: Any, column: str) -> list[dict[str, Any]]:
    """The functions that a conversation may call, in OpenAI's form, from a list or JSON text."""
    if isinstance(value, str):
        value = [] if value.strip() in _NO_TOOLS else _loads(value) or ""
    tools = [_clean(_loads(tool) if isinstance(tool, str) else tool) for tool in _listed(value)]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"column {column} is neither a list of tools nor JSON text that holds one")
    return [{"type": "function", **_named(tool)} for tool in tools]


def _clean(value: Any) -> Any:
    """Without the nulls with which a table fills up the fields that a struct does not have."""
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items() if item is not None}
    return [_clean(item) for item in value] if isinstance(value, list) else value


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _from_json(text: str, column: str) -> list[Any] | None:
    """The list of turns that a text is the JSON of; None where it is not."""
    if not text.lstrip().startswith("["):
        return None
    found = _loads(text)
    if isinstance(found, list) and found and all(isinstance(turn, dict) for turn in found):
        return found if any(key in found[0] for key in ROLE_KEYS) else None
    if found is None and _LOOKS_LIKE_TURNS.match(text):
        raise RowError(f"column {column} holds text that looks like a list of turns and is not JSON")
    return None


def _from_texts(texts: list[str], column: str) -> list[Any]:
    """Turns from texts without roles: the JSON of a turn each, else the user's and the assistant's in turn."""
    turns = [_loads(text) for text in texts]
    if all(isinstance(turn, dict) and any(key in turn for key in ROLE_KEYS) for turn in turns):
        return turns
    if texts[1:] and column.lower() in ("turns", *PROMPTS):  # benchmarks have the user's turns alone in them
        raise RowError(f"column {column} holds {len(texts)} texts without their speakers; expected {{role, content}}")
    return [{"role": role, "content": text} for role, text in zip(cycle(_SPEAKERS), texts, strict=False)]


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _turns(item: Any, where: str) -> Messages:
    keys = pair(list(item)) if isinstance(item, dict) else None
    if keys is None:
        return [_turn(item, where)]
    return [{"role": role, "content": _content(item[key], where)} for role, key in zip(_SPEAKERS, keys, strict=True)]


def _turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError(f"{where} is {_shown(turn)}; expected {{role, content}} or {{from, value}}")
    turn = _clean(turn)
    name = next((turn[key] for key in ROLE_KEYS if key in turn), None)
    role = _ROLE.get(name.strip().lower().replace("-", "_")) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"{where} has the role {_shown(name)}; expected {_EXPECTED}")
    content = _content(next((turn[key] for key in CONTENT_KEYS if key in turn), None), where)
    rest = {key: item for key, item in turn.items() if key not in (*ROLE_KEYS, *CONTENT_KEYS, "tool_calls")}
    reasoning = next((rest[key] for key in _REASONING_KEYS if rest.get(key)), None)
    if reasoning and not rest.get("reasoning_content"):
        rest["reasoning_content"] = reasoning
    if role == "function_call":
        return {"role": "assistant", "content": content, **written_call(content)}
    calls = turn.get("tool_calls") or rest.pop("function_call", None) or ""
    called = {} if calls in _NO_TOOLS else {"tool_calls": _calls(calls, where)}
    return {"role": role, "content": content, **rest, **called}


def _content(value: Any, where: str) -> str:
    """Text, or the parts of a text."""
    texts = []
    for item in _listed(value):
        part = {"text": item} if isinstance(item, str) else item
        kind, text = (part.get("type", "text"), part.get("text")) if isinstance(part, dict) else (_shown(part), None)
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise RowError(f"{where} has a part of type {kind} in its content; only text can be read")
        texts.append(text)
    return "".join(texts)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as values, which is how templates and servers take them."""
    calls = _listed((_loads(value) or value) if isinstance(value, str) else value)
    if not all(isinstance(call, dict) for call in calls):
        raise RowError(f"{where} has tool_calls {_shown(value)}; expected a list of calls")
    return [{"type": "function", **call, "function": _call(call["function"])} for call in map(_named, calls)]


def _named(call: dict[str, Any]) -> dict[str, Any]:
    return call if "function" in call else {"function": call}


def _call(call: Any) -> Any:
    arguments = call.get("arguments") if isinstance(call, dict) else None
    values = _loads(arguments) if isinstance(arguments, str) else None
    return {**call, "arguments": values} if isinstance(values, dict) else call


def written_call(text: str) -> dict[str, Any]:
    """The call that a text is, for templates that have a place for calls; others show the text."""
    calls = _listed(_loads(text))
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        return {}
    return {"tool_calls": _calls(calls, text), "written_call": True}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"

"""Conversations -> tokens and loss mask, right to the token, through the tokenizer's own chat template.

A conversation is rendered in the two parts that serving sees: the prompt, which is the template's rendering of all
before the last answer with the generation prompt at its end, and the answer, which is what the rendering of the whole
conversation adds to it. The prompt is tokenized by itself, as serving does it, and the answer follows from there.

An assistant turn reaches from the end of its generation prompt through its end-of-turn token: the first special token
after its content, or the last one after a tool call, which may hold others. What follows, such as the newline after
<|im_end|>, is not the assistant's. Where a template closes turns with no special token, a turn ends with its content.

Where the content ends is found by rendering the conversation once more with a marker for it: what follows the marker
is what follows the content, whatever the template does to it. An earlier turn that does not stand where its generation
prompt ends has no place, and is not supervised.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from spec.corpus.sequences import CorpusError
from spec.corpus.turns import Messages, RowError
from spec.section import DATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# "Assistant:" ends without a space, because most vocabularies carry the space at the front of the word after it.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
EDGE = "\uf8ff"  # a private use character: templates do not hold it, and ChatTemplate.render keeps it out of text
MARKER = f"{EDGE}answer{EDGE}"
ASKED = f"{EDGE}question{EDGE}"
CARRIED = ("functions", "function_calls", "tools", "images", "videos", "audios")  # what a turn has next to its content
FUNCTION = "marked_function"
OPEN, CLOSE = "<think>", "</think>"

Message = dict[str, Any]
Tools = Sequence[dict[str, Any]]
_QUESTION: Message = {"role": "user", "content": "a"}
_MARKED_QUESTION: Message = {"role": "user", "content": MARKER}
_MARKED: Message = {"role": "assistant", "content": MARKER}
_CALL = {"id": "a" * 9, "type": "function", "function": {"name": FUNCTION, "arguments": {"a": "b"}}}
_MARKED_CALL: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}


@dataclass(frozen=True)
class Form:
    """How a template takes messages."""

    parts: bool = False  # content is a list of parts and not text
    calls: Literal["values", "text"] | None = None  # what arguments of tool calls are; None: no place for calls


@dataclass(frozen=True)
class Chat:
    """A rendered conversation."""

    prompt: str  # up to where the last answer starts
    answer: str | None  # through its end-of-turn token; None when it is still to be written
    turns: tuple[tuple[int, int], ...]  # (start, stop) of each earlier assistant turn, in characters of the prompt
    unplaced: int = 0  # earlier assistant turns that are rendered in a way that no turn's place can be told


def install_plain_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without a chat template the plain one, with BOS in front where the tokenizer itself puts it;
    returns whether it has the plain template now."""
    if tokenizer.chat_template is not None:
        return str(tokenizer.chat_template).endswith(PLAIN_TEMPLATE)
    starts = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{ bos_token }}" if starts else "") + PLAIN_TEMPLATE
    return True


class ChatTemplate:
    """A tokenizer's chat template, able to tell the assistant's tokens from the rest.

    `date` is the day that a template takes for today, so that a row has the same ids on every day; with None, a
    template that asks for the day is an error. `end_of_turn` is the token that closes a turn, if there is one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: datetime.date | None = DATE) -> None:
        self.tokenizer = tokenizer
        self._template = _dated(str(tokenizer.get_chat_template()), date)
        self._tool_template = _dated(str(tokenizer.get_chat_template(tools=[{}])), date)
        self._form = self._find_form()
        rest = self._render([_QUESTION, _MARKED]).partition(MARKER)[2]
        self._end = next((tokens for tokens in _end_tokens(tokenizer) if tokens.search(rest)), None)
        closing = self._find_closing(self._end, rest) if self._end else []
        self.end_of_turn, self._closing = (closing[-1] if closing else None), "".join(closing)

    def render(self, messages: Messages, tools: Tools = (), *, need_answer: bool = True) -> Chat:
        """Render a conversation, whose last message is the assistant's if it has an answer.

        An answer that does not start where its generation prompt ends is an error where `need_answer` is set; otherwise
        it is left off. It is an error, too, if the template refuses the conversation or leaves a part of it out.
        """
        held = json.dumps([messages, list(tools)], ensure_ascii=False, default=str)
        if EDGE not in held:
            return self._chat(messages, tools, need_answer)
        # Another character stands for it meanwhile, or the text could pass for a marker.
        spare = next(char for char in map(chr, range(0xE000, 0xF8FF)) if char not in held)
        messages, tools = json.loads(held.replace(EDGE, spare))
        chat = self._chat(messages, tools, need_answer)
        answer = None if chat.answer is None else chat.answer.replace(spare, EDGE)
        return replace(chat, prompt=chat.prompt.replace(spare, EDGE), answer=answer)

    def _chat(self, messages: Messages, tools: Tools, need_answer: bool) -> Chat:
        answered = messages[-1]["role"] == "assistant"
        before = messages[:-1] if answered else messages
        prompt, turns, answer = self._render(before, tools, generate=True), [], None
        self._check_shown(prompt, before, tools)
        places = [i for i, turn in enumerate(before) if turn["role"] == "assistant" and turn.get("weight") != 0]
        for i in places:
            with contextlib.suppress(RowError):
                generation = self._render(before[:i], tools, generate=True)
                turns.append(self._turn(prompt, generation, before, i, tools, generate=True))
        with contextlib.nullcontext() if need_answer else contextlib.suppress(RowError):
            answer = self._answer(prompt, messages, tools) if answered else None
        return Chat(prompt, answer, tuple(turns), len(places) - len(turns))

    def _render(self, messages: Messages, tools: Tools = (), *, generate: bool = False) -> str:
        template, shaped = self._tool_template if tools else self._template, [*map(self._shaped, messages)]
        options: Any = {"tools": list(tools) or None, "tokenize": False, "add_generation_prompt": generate}
        try:
            return str(self.tokenizer.apply_chat_template(shaped, chat_template=template, **options))
        except Exception as error:  # a template is a program: whatever it raises is about this conversation
            roles = ", ".join(m["role"] for m in messages)
            raise RowError(f"the chat template refuses a conversation of {roles}: {error}") from error

    def _shaped(self, message: Message) -> Message:
        """A message as this template takes it."""
        content = message.get("content") or ""
        shaped: Message = {**message, "content": content}
        if shaped.pop("written_call", False):
            shaped["content"] = content if self._form.calls is None else ""
        calls = shaped.pop("tool_calls", None)  # some templates ask whether the key is there
        if calls and self._form.calls is not None:
            shaped["tool_calls"] = list(map(_with_text, calls)) if self._form.calls == "text" else calls
        if self._form.parts:
            shaped["content"] = [{"type": "text", "text": shaped["content"]}]
        return shaped

    def _find_form(self) -> Form:
        """The first form in which the template shows text, and calls."""
        refusals: list[RowError] = []

        def shows(form: Form, messages: Messages, marker: str) -> bool:
            self._form = form
            try:
                return self._render(messages).count(marker) >= str(messages).count(repr(marker))
            except RowError as error:
                refusals.append(error)
                return False

        forms = (Form(), Form(parts=True))
        text = next((form for form in forms if shows(form, [_MARKED_QUESTION, _MARKED], MARKER)), None)
        if text is None and refusals:
            raise refusals[0]
        text = text or Form()
        calls = (replace(text, calls="values"), replace(text, calls="text"))
        return next((form for form in calls if shows(form, [_QUESTION, _MARKED_CALL], FUNCTION)), text)

    def _find_closing(self, tokens: re.Pattern[str], rest: str) -> list[str]:
        """The tokens that together close a turn, whether or not another turn follows."""
        following = ""
        with contextlib.suppress(RowError):
            following = self._render([_QUESTION, _MARKED, _QUESTION], generate=True).partition(MARKER)[2]
        last = _adjacent(tokens, rest)
        pairs = zip(last, _adjacent(tokens, following), strict=False)
        return [token for token, other in takewhile(lambda pair: pair[0] == pair[1], pairs)] or last[:1]

    def _check_shown(self, prompt: str, messages: Messages, tools: Tools) -> None:
        """Check that the template leaves nothing out that the base has to know: turns, tool calls, tools."""
        for i, message in enumerate(messages):
            self._check_call(message)
            for key in filter(message.get, CARRIED):
                bare = [*messages[:i], {**message, key: None}, *messages[i + 1 :]]
                if prompt == self._render(bare, tools, generate=True):
                    raise RowError(f"the chat template leaves out the {key} of a turn of {message['role']}")
            if message["role"] == "assistant" or (message.get("content") or "").strip() in prompt:
                continue
            if MARKER not in self._render(_marked(messages, i), tools, generate=True):
                raise RowError(f"the chat template leaves out a turn of {message['role']}")
        if tools and prompt == self._render(messages, generate=True):
            raise CorpusError(
                "the chat template leaves out the tools that a conversation may call: name their column in "
                "data.ignore_columns to do without them, or use a base whose template has a place for them"
            )

    def _check_call(self, message: Message) -> None:
        if self._form.calls is None and message.get("tool_calls") and not message.get("written_call"):
            raise RowError("the chat template leaves out tool_calls")

    def _answer(self, prompt: str, messages: Messages, tools: Tools) -> str:
        """The text of the last message, through its end-of-turn token, as what follows the prompt: from the rendering
        of the whole conversation; else from what follows the last question in it, where a template moves other parts
        of the prompt; else from the data, where a template drops its thought."""
        *asked, answer = messages
        self._check_call(answer)
        refusal = None
        for context in (asked, [*asked[:-1], {**asked[-1], "content": ASKED}]):
            turns = [*context, answer]
            try:
                before = prompt if context is asked else _tail(self._render(context, tools, generate=True))
                text = _tail(self._render(turns, tools))
                start, stop = self._turn(text, before, turns, len(asked), tools)
            except RowError as error:
                refusal = refusal or error
                continue
            if _thought(answer) in text[start:stop]:
                return text[start:stop]
        return self._as_written(prompt, messages, tools, refusal)

    def _as_written(self, prompt: str, messages: Messages, tools: Tools, refusal: RowError | None) -> str:
        """The last answer as the base writes it after a prompt that may have opened its thought. The template's refusal
        stands, unless the answer holds a thought or differs in white space alone."""
        *asked, answer = messages
        content, reasoning = answer.get("content") or "", answer.get("reasoning_content")
        text = f"{OPEN}\n{reasoning.strip()}\n{CLOSE}\n\n{content}" if reasoning else content
        if prompt.rstrip().endswith(OPEN):
            text = text.lstrip().removeprefix(OPEN)
            text = text if prompt.endswith(OPEN) else text.lstrip()
        bare = {key: item for key, item in answer.items() if key != "reasoning_content"}
        start, found, rest = self._render([*asked, {**bare, "content": MARKER}], tools).partition(MARKER)
        if refusal and not (found and (_thought(answer) or start.rstrip() == prompt.rstrip())):
            raise refusal
        if not found:
            raise RowError("the chat template drops the thought of an answer, and how the answer ends is not known")
        return text + rest[: self._end_in(rest, answer)]

    def _turn(
        self, text: str, before: str, messages: Messages, i: int, tools: Tools, *, generate: bool = False
    ) -> tuple[int, int]:
        """(start, stop) of the assistant's message i in text, the rendering of messages; before is its prompt's."""
        message = messages[i]
        if message.get("tool_calls"):
            # Its end is where the rendering of the conversation through this turn ends.
            closed = _tail(self._render(messages[: i + 1], tools)).rstrip()
            if not text.startswith(closed) and i + 1 < len(messages):
                closed = self._until_next(messages, i, tools, generate)
            rest, stop = closed[len(before) :], len(before)
            placed = text.startswith(closed) and closed.startswith(before)
        else:
            _, found, rest = self._render(_marked(messages, i), tools, generate=generate).partition(MARKER)
            stop = len(text) - len(rest)
            placed = bool(found) and text.startswith(before) and text.endswith(rest) and stop >= len(before)
        if not placed:
            raise RowError(
                f"the chat template does not render assistant message {i} as what follows its generation prompt "
                f"(…{before[-40:]!r}), so its tokens cannot be told from the prompt's: use rows with a single answer "
                "and respond.source=base, or another template"
            )
        return len(before), stop + self._end_in(rest, message)

    def _until_next(self, messages: Messages, i: int, tools: Tools, generate: bool) -> str:
        """The rendering through the end of turn i, told by what stands between an answer in its place and the next."""
        following = [{**messages[i + 1], "content": ASKED}, *messages[i + 2 :]]
        answered = self._render([*messages[:i], _MARKED, *following], tools, generate=generate)
        between = answered.partition(MARKER)[2].partition(ASKED)[0]
        through = self._render([*messages[: i + 1], *following], tools, generate=generate).partition(ASKED)[0]
        if not through.endswith(between):
            raise RowError("the chat template closes a tool call and an answer differently")
        return through.removesuffix(between) + between[: self._end_in(between, _MARKED)]

    def _end_in(self, rest: str, message: Message) -> int:
        """Where the end-of-turn token ends in what follows a message's content, or is the whole of a tool call."""
        if not message.get("tool_calls"):
            end = self._end.search(rest) if self._end else None
            if end and rest.startswith(self._closing, end.start()):
                return end.start() + len(self._closing)
            return end.end() if end else 0
        closed = len(rest.rstrip())
        if self._end and not any(end.end() == closed for end in self._end.finditer(rest)):
            raise RowError("the chat template closes a tool call with no end-of-turn token")
        return closed


def _adjacent(tokens: re.Pattern[str], text: str) -> list[str]:
    """The first token in a text, and those that follow it at once."""
    found: list[str] = []
    first = tokens.search(text)
    while first:
        found.append(first[0])
        first = tokens.match(text, first.end())
    return found


def _marked(messages: Messages, i: int) -> Messages:
    return [*messages[:i], {**messages[i], "content": MARKER}, *messages[i + 1 :]]


def _tail(text: str) -> str:
    """What follows the last question, where that is marked; else all."""
    return text.rpartition(ASKED)[2]


def _thought(message: Message) -> str:
    """What the assistant thought before it answered; empty where it does not say."""
    if message.get("reasoning_content"):
        return str(message["reasoning_content"]).strip()
    thought, closed, _ = (message.get("content") or "").partition(CLOSE)
    return str(thought.strip().removeprefix(OPEN).strip()) if closed else ""


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are JSON text."""
    function = call.get("function", call)
    written = {**function, "arguments": json.dumps(function.get("arguments", {}), ensure_ascii=False)}
    return {**call, "function": written} if "function" in call else written


def _dated(template: str, date: datetime.date | None) -> str:
    """The template with a strftime_now of its own, since that of transformers reads the clock: a macro that replaces
    each code of the format, because transformers lets no function into a template."""
    if "strftime_now" not in template:
        return template
    if date is None:
        today = "raise_exception('it prints the date, and data.date is null: set it to a day, such as 2026-01-01')"
    else:
        codes = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBdejmUwWyYxDFGVHIMSpc%"]
        today = "format" + "".join(f".replace({code!r}, {date.strftime(code)!r})" for code in codes)
    # trim_blocks takes the newline away, so that the template itself still begins a line
    return f"{{% macro strftime_now(format) %}}{{{{ {today} }}}}{{% endmacro %}}\n{template}"


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> Iterator[re.Pattern[str]]:
    """What may close a turn: the special tokens, else any token added to the vocabulary."""
    added = tokenizer.added_tokens_decoder.values()
    special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    for tokens in (special, {token.content for token in added}):
        longest_first = sorted(filter(str.strip, tokens), key=lambda token: (-len(token), token))
        if longest_first:
            yield re.compile("|".join(map(re.escape, longest_first)))

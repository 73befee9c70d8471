"""Conversations -> tokens and loss mask, right to the token, through the tokenizer's own chat template.

A conversation is rendered in the two parts that serving sees: the prompt, which is the template's rendering of all
before the last answer with the generation prompt at its end, and the answer, which is what the rendering of the whole
conversation adds to it. The prompt is tokenized by itself, as serving does it, and the answer follows from there.

An assistant turn reaches from the end of its generation prompt through the first special token after its content
(the end-of-turn token, with the whitespace that some templates put before it); the rest of its rendering, such as the
newline after <|im_end|>, is not the assistant's. Where a template closes turns with no special token, a turn ends with
its content, and nothing is added that the template does not render.

Where the content ends is found by rendering the conversation once more with a marker for it: what follows the marker
is what follows the content, whatever the template does to it (strip it, drop its thoughts) and whatever it contains.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spec.config import DATE
from spec.corpus.sequences import CorpusError, Ids, Mask
from spec.corpus.sources import Messages

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
MARKER = "\uf8ffanswer\uf8ff"  # private use characters: neither text nor templates hold them
# Text before an answer that keeps a tokenizer from treating it as the start of a text (see _continue).
ANCHORS = ("", "\n", "a")


class PrefixError(CorpusError):
    """The template's rendering of a prompt is not where the rendering of its answer starts."""


@dataclass(frozen=True)
class Chat:
    """A rendered conversation.

    prompt: text up to where the last answer starts.
    answer: text of the last answer, through its end-of-turn token; None when it is still to be written.
    turns: (start, stop) of each earlier assistant turn, in characters of the prompt.
    """

    prompt: str
    answer: str | None
    turns: tuple[tuple[int, int], ...]


def install_plain_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without a chat template the plain one; say whether it has the plain one now.

    It starts with the BOS token where the tokenizer itself starts text so.
    """
    if tokenizer.chat_template is not None:
        return str(tokenizer.chat_template).endswith(PLAIN_TEMPLATE)
    starts = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{ bos_token }}" if starts else "") + PLAIN_TEMPLATE
    return True


class ChatTemplate:
    """A tokenizer's chat template, able to tell the assistant's tokens from the rest.

    Args:
        tokenizer: has the template.
        date: the day that a template takes for today, so that a row has the same ids on every day; None: a template
            that asks for it is an error.

    Attributes:
        end_of_turn: the token that closes an assistant turn; None where the template has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: datetime.date | None = DATE) -> None:
        self.tokenizer = tokenizer
        self._template = _dated(str(tokenizer.get_chat_template()), date)
        self.end_of_turn: str | None = None
        self._end: re.Pattern[str] | None = None
        question: Messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARKER}]
        rest = self._render(question).partition(MARKER)[2]
        for tokens in _end_tokens(tokenizer):
            found = tokens and tokens.search(rest)
            if found:
                self.end_of_turn, self._end = found[0], tokens
                break

    def render(self, messages: Messages) -> Chat:
        """Render a conversation, whose last message is the assistant's if it has an answer.

        Raises:
            PrefixError: an assistant turn does not start where its generation prompt ends.
            CorpusError: the template refuses the conversation (with its own words).
        """
        answered = messages[-1]["role"] == "assistant"
        before = messages[:-1] if answered else messages
        prompt = self._render(before, generate=True)
        turns = tuple(
            self._turn(prompt, self._render(before[:i], generate=True), before, i, generate=True)
            for i, message in enumerate(before)
            if message["role"] == "assistant"
        )
        if not answered:
            return Chat(prompt, None, turns)
        whole = self._render(messages)
        start, stop = self._turn(whole, prompt, messages, len(before), generate=False)
        return Chat(prompt, whole[start:stop], turns)

    def encode(self, chats: Sequence[Chat], where: Sequence[str]) -> list[tuple[Ids, Mask, int]]:
        """Tokenize rendered conversations: (ids [T], mask [T], prompt_length) of each.

        where names each conversation in errors.

        The first prompt_length ids are apply_chat_template(prompt, add_generation_prompt=True); after an answer's
        end-of-turn token nothing follows. In the earlier turns, which serving tokenizes as one text with all around
        them, a token that begins before its turn's first character is not supervised: the base could not have
        written it.
        """
        if not chats:
            return []
        turns = any(chat.turns for chat in chats)
        if turns and not self.tokenizer.is_fast:
            raise CorpusError(
                f"{type(self.tokenizer).__name__} has no character offsets, which rows with several assistant turns "
                "need: use the model's fast tokenizer"
            )
        prompts = self._tokens([chat.prompt for chat in chats], offsets=turns)
        answered = [i for i, chat in enumerate(chats) if chat.answer is not None]
        texts = [chat.prompt + chat.answer for chat in chats if chat.answer is not None]
        wholes = dict(zip(answered, self._tokens(texts)["input_ids"] if texts else [], strict=True))
        encoded = []
        for i, chat in enumerate(chats):
            prompt: list[int] = prompts["input_ids"][i]
            answer = [] if chat.answer is None else self._continue(prompt, chat.answer, wholes[i], where[i])
            mask = np.zeros(len(prompt) + len(answer), dtype=np.uint8)
            mask[len(prompt) :] = 1
            if chat.turns:
                starts = _starts(prompts["offset_mapping"][i], prompts.encodings[i].tokens)
                for start, stop in chat.turns:
                    mask[: len(prompt)] |= (starts >= start) & (starts < stop)
            encoded.append((np.array(prompt + answer, dtype=np.int32), mask, len(prompt)))
        return encoded

    def _render(self, messages: Messages, *, generate: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=self._template, tokenize=False, add_generation_prompt=generate
                )
            )
        except Exception as error:  # a template is a program: whatever it raises is about this conversation
            roles = ", ".join(m["role"] for m in messages)
            raise CorpusError(f"the chat template refuses a conversation of {roles}: {error}") from error

    def _turn(self, text: str, before: str, messages: Messages, i: int, *, generate: bool) -> tuple[int, int]:
        """(start, stop) of the assistant's message i in text, the rendering of messages; before is its prompt's."""
        marked = [*messages[:i], {**messages[i], "content": MARKER}, *messages[i + 1 :]]
        _, found, rest = self._render(marked, generate=generate).partition(MARKER)
        stop = len(text) - len(rest)
        if not (text.startswith(before) and found and text.endswith(rest) and stop >= len(before)):
            raise PrefixError(
                f"the chat template does not render assistant message {i} as what follows its generation prompt "
                f"(…{before[-40:]!r}), so its tokens cannot be told from the prompt's: use rows with a single answer "
                "and respond.source=base, or another template"
            )
        end = self._end.search(rest) if self._end else None
        return len(before), stop + (end.end() if end else 0)

    def _tokens(self, texts: list[str], *, offsets: bool = False) -> Any:
        # No special tokens: the template has written them. So does apply_chat_template(tokenize=True).
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )

    def _continue(self, prompt: list[int], answer: str, whole: list[int], where: str) -> list[int]:
        """The tokens of an answer after the prompt's own; whole is prompt and answer tokenized as one text.

        Nearly always whole starts with the prompt's tokens. Where a token reaches across the boundary (newlines
        that merge, a space that belongs to the next word), the base, which is fed the prompt's tokens, continues
        with others: the answer is then tokenized by itself, in the first way that gives the same text.
        """
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        text = self._decode(whole)
        for anchor in ANCHORS:
            first, both = self._tokens([anchor, anchor + answer])["input_ids"]
            if both[: len(first)] == first and self._decode(prompt + both[len(first) :]) == text:
                return list(both[len(first) :])
        raise CorpusError(f"{where}: the tokens of the answer {answer[:40]!r}… cannot be told from its prompt's")

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _dated(template: str, date: datetime.date | None) -> str:
    """The template with a strftime_now of its own, since that of transformers reads the clock.

    transformers lets no function into a template, so it is a macro that replaces each code of the format.
    """
    if "strftime_now" not in template:
        return template
    if date is None:
        today = "raise_exception('it prints the date, and data.date is null: set it to a day, such as 2026-01-01')"
    else:
        codes = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBdejmUwWyYxDFGVHIMSpc%"]
        today = "format" + "".join(f".replace({code!r}, {date.strftime(code)!r})" for code in codes)
    # trim_blocks takes the newline away, so that the template itself still begins a line
    return f"{{% macro strftime_now(format) %}}{{{{ {today} }}}}{{% endmacro %}}\n{template}"


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[re.Pattern[str] | None]:
    """What may close a turn: the special tokens, else any token added to the vocabulary."""
    added = tokenizer.added_tokens_decoder.values()
    special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    patterns: list[re.Pattern[str] | None] = []
    for tokens in (special, {token.content for token in added}):
        longest_first = sorted((t for t in tokens if t.strip()), key=lambda t: (-len(t), t))
        patterns.append(re.compile("|".join(map(re.escape, longest_first))) if longest_first else None)
    return patterns


def _starts(offsets: Sequence[tuple[int, int]], tokens: Sequence[str]) -> npt.NDArray[np.int64]:
    """The character at which each token starts: [T].

    Some byte-level tokenizers (Llama 3) report offsets without the spaces that a token starts with (its Ġ); they are
    put back as far as the end of the token before.
    """
    start, stop = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    spaces = np.array([len(token) - len(token.lstrip("Ġ")) for token in tokens], dtype=np.int64)
    previous = np.concatenate([[0], np.maximum.accumulate(stop)[:-1]])
    return np.where(spaces > 0, np.maximum(previous, start - spaces), start)

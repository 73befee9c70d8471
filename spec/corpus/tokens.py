"""Rendered conversations -> tokens and loss mask, right to the token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spec.corpus.chat import Chat
from spec.corpus.sequences import CorpusError, Ids, Mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text before an answer that keeps a tokenizer from treating it as the start of a text (see _continue).
ANCHORS = ("", "\n", "a")


def tokenize(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> list[tuple[Ids, Mask, int]]:
    """Tokenize rendered conversations: (ids [T], mask [T], prompt_length) of each.

    The first prompt_length ids are apply_chat_template(prompt, add_generation_prompt=True). In the earlier turns,
    which serving tokenizes as one text with all around them, a token that begins before its turn's first character is
    not supervised: the base could not have written it. An answer whose tokens cannot be told from its prompt's is left
    off.
    """
    if not chats:
        return []
    turns = any(chat.turns for chat in chats)
    if turns and not tokenizer.is_fast:
        none = f"{type(tokenizer).__name__} has no character offsets, which rows with several assistant turns need"
        raise CorpusError(f"{none}: use the model's fast tokenizer")
    prompts = _tokens(tokenizer, [chat.prompt for chat in chats], offsets=turns)
    wholes = _tokens(tokenizer, [chat.prompt + (chat.answer or "") for chat in chats])["input_ids"]
    encoded = []
    for i, chat in enumerate(chats):
        prompt: list[int] = prompts["input_ids"][i]
        answer = _continue(tokenizer, prompt, chat.answer or "", wholes[i])
        mask = np.zeros(len(prompt) + len(answer), dtype=np.uint8)
        mask[len(prompt) :] = 1
        if chat.turns:
            starts = _starts(prompts["offset_mapping"][i], prompts.encodings[i].tokens)
            for start, stop in chat.turns:
                mask[: len(prompt)] |= (starts >= start) & (starts < stop)
        encoded.append((np.array(prompt + answer, dtype=np.int32), mask, len(prompt)))
    return encoded


def _tokens(tokenizer: Any, texts: list[str], *, offsets: bool = False) -> Any:
    # No special tokens: the template has written them. So does apply_chat_template(tokenize=True).
    return tokenizer(texts, add_special_tokens=False, return_offsets_mapping=offsets, verbose=False)


def _continue(tokenizer: Any, prompt: list[int], answer: str, whole: list[int]) -> list[int]:
    """The tokens of an answer after the prompt's own; whole is prompt and answer tokenized as one text.

    Nearly always whole starts with the prompt's tokens. Where a token reaches across the boundary (newlines that merge,
    a space that belongs to the next word), the base, which is fed the prompt's tokens, continues with others. Then the
    answer is tokenized by itself, in the first way that gives the same text; the result is empty where there is none.
    """
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    text = _decode(tokenizer, whole)
    for anchor in ANCHORS:
        first, both = _tokens(tokenizer, [anchor, anchor + answer])["input_ids"]
        if both[: len(first)] == first and _decode(tokenizer, prompt + both[len(first) :]) == text:
            return list(both[len(first) :])
    return []


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _starts(offsets: Sequence[tuple[int, int]], tokens: Sequence[str]) -> npt.NDArray[np.int64]:
    """The character at which each token starts: [T].

    Some byte-level tokenizers (Llama 3) report offsets without the spaces that a token starts with (its Ġ); they are
    put back as far as the end of the token before.
    """
    start, stop = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    spaces = np.array([len(token) - len(token.lstrip("Ġ")) for token in tokens], dtype=np.int64)
    previous = np.concatenate([[0], np.maximum.accumulate(stop)[:-1]])
    return np.where(spaces > 0, np.maximum(previous, start - spaces), start)

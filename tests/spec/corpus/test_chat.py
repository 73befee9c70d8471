"""Chat templates: what of a conversation is supervised, and what a template takes."""

import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spec import corpus
from spec.corpus import ChatTemplate, CorpusError
from spec.corpus.chat import ASKED, MARKER

from . import families
from .families import assistant, byte_level, encode, prompt_ids, sentencepiece_like, serving, supervised, user

DAY = datetime.date(2026, 3, 7)
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\n' }}" + families.CHATML


def test_an_earlier_turn_of_weight_0_is_not_supervised() -> None:
    messages = [user("a"), {**assistant("b"), "weight": 0}, user("c"), {**assistant("d"), "weight": 1}]
    assert supervised(byte_level(), encode(byte_level(), messages)) == ["d<|im_end|>"]


def test_an_answer_that_merges_with_its_prompt_continues_from_the_tokens_that_serving_feeds() -> None:
    tokenizer = byte_level()
    alone, merged = (tokenizer(f"<|im_start|>assistant\n{answer}")["input_ids"] for answer in ("", "\n\nc"))
    assert merged[: len(alone)] != alone
    messages = [user("a"), assistant("\n\nc"), user("b"), assistant("\n\nc")]
    sequence = encode(tokenizer, messages)
    assert prompt_ids(sequence) == serving(tokenizer, messages[:-1])
    # In history the merged token began before the turn did: it is the prompt's. The last answer is whole.
    first, last = supervised(tokenizer, sequence)
    assert "\n\nc<|im_end|>".endswith(first)
    assert first != "\n\nc<|im_end|>"
    assert last == "\n\nc<|im_end|>"


@pytest.mark.parametrize("trim", [False, True])
def test_a_generation_prompt_that_ends_in_a_space_keeps_it(trim: bool) -> None:
    tokenizer = byte_level(families.SPACE, trim=trim)
    messages = [user("a"), assistant("the answer"), user("b"), assistant("the answer")]
    sequence = encode(tokenizer, messages)
    assert prompt_ids(sequence) == serving(tokenizer, messages[:-1])
    assert tokenizer.decode(sequence.ids) == "HUMAN: a\nBOT: the answer<|im_end|>\nHUMAN: b\nBOT: the answer<|im_end|>"
    first, last = supervised(tokenizer, sequence)
    assert last == "the answer<|im_end|>"
    # The space and the letters in its token were not the assistant's to write, whatever offsets say of the space.
    assert "the answer<|im_end|>".endswith(first)
    assert first.endswith(" answer<|im_end|>")


def test_an_end_of_turn_token_that_swallows_the_newline_after_it_is_supervised() -> None:
    tokenizer = byte_level(rstrip=True)
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    sequence = encode(tokenizer, messages)
    assert [text.rstrip() for text in supervised(tokenizer, sequence)] == ["b<|im_end|>", "d<|im_end|>"]
    assert prompt_ids(sequence) == serving(tokenizer, messages[:-1])


def test_llama2_supervises_through_eos_across_turns() -> None:
    tokenizer = sentencepiece_like()
    messages = [{"role": "system", "content": "be"}, user(" a "), assistant("Hi\nb"), user("b"), assistant(" Hi a ")]
    sequence = encode(tokenizer, messages)
    assert prompt_ids(sequence) == serving(tokenizer, messages[:-1])
    assert sequence.ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    tokens = [tokenizer.convert_ids_to_tokens(sequence.ids[a:b].tolist()) for a, b in corpus.spans(sequence.mask)]
    assert tokens == [["▁Hi", "<0x0A>", "b", "▁", "</s>"], ["▁Hi", "▁a", "▁", "</s>"]]


def test_llama2_style_tokens_do_not_gain_a_space_at_a_merged_boundary() -> None:
    tokenizer = sentencepiece_like(families.SPACE.replace("<|im_end|>", "</s>"))
    sequence = encode(tokenizer, [user("a"), assistant("Hi")])
    assert tokenizer.convert_ids_to_tokens(corpus.answer(sequence).tolist()) == ["H", "i", "</s>"]
    assert prompt_ids(sequence) == serving(tokenizer, [user("a")])


def test_a_template_without_an_end_of_turn_token_supervises_the_content_alone(tmp_path: Path) -> None:
    tokenizer = byte_level(families.UNCLOSED)
    assert ChatTemplate(tokenizer).end_of_turn is None
    sequence = encode(tokenizer, [user("a"), assistant("the answer is 42"), user("b"), assistant("hello")])
    first, last = supervised(tokenizer, sequence)
    assert first.rstrip() == "the answer is 42"
    assert last == "hello"
    _, report = families.run(families.save(tmp_path / "q.parquet", [{"question": "a", "answer": "b"}]), tokenizer)
    assert any("no special token" in line for line in report.lines())


def test_a_base_without_a_template_gets_the_plain_one_and_the_report_says_so(tmp_path: Path) -> None:
    tokenizer = byte_level(None, eos_token="<|endoftext|>")
    messages = [user("a"), assistant("hello"), user("b"), assistant("\n the answer ")]
    sequences, report = families.run(families.save(tmp_path / "m.parquet", [{"messages": messages}]), tokenizer)
    assert tokenizer.chat_template == corpus.PLAIN_TEMPLATE
    assert supervised(tokenizer, sequences[0]) == [" hello<|endoftext|>", " \n the answer <|endoftext|>"]
    assert prompt_ids(sequences[0]) == serving(tokenizer, messages[:-1])
    begins = "User: a\n\nAssistant: hello<|endoftext|>\n\nUser: b\n\nAssistant:"
    assert tokenizer.decode(sequences[0].ids).startswith(begins)
    assert report.plain_template
    assert any("no chat template" in line for line in report.lines())
    assert families.run(tmp_path / "m.parquet", tokenizer)[1].plain_template
    assert not families.run(tmp_path / "m.parquet")[1].plain_template


def test_the_plain_template_starts_with_bos_where_the_tokenizer_does() -> None:
    tokenizer = sentencepiece_like(None)
    assert corpus.install_plain_template(tokenizer)
    sequence = encode(tokenizer, [user("a"), assistant("Hi")])
    assert sequence.ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(corpus.answer(sequence).tolist()) == ["▁Hi", "</s>"]


LIKE_THE_TEMPLATE = ["x<|im_end|>\ny", "<|im_start|>assistant\n", "\n", "a<|im_end|>"]
AWKWARD = ["\n", "\n\n", " ", " the answer ", "a\r\n", "é\u0301", "👩‍👩‍👧", "\n\nthe answer is 42\n", "<think>"]
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from([*AWKWARD, "def f(x):\n    "])


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    system = draw(st.none() | text)
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for _ in range(draw(st.integers(1, 3))):
        messages += [user(draw(text)), assistant(draw(text))]
    return messages if draw(st.booleans()) else messages[:-1]


@settings(max_examples=150)
@given(messages=conversations(), trim=st.booleans())
@example(messages=[user(MARKER), assistant("b"), user("c"), assistant(MARKER)], trim=False)
@example(messages=[user(ASKED), assistant(ASKED)], trim=True)
@example(messages=[m for text in LIKE_THE_TEMPLATE for m in (user("a<|im_end|>"), assistant(text))], trim=False)
def test_any_conversation_is_masked_by_the_token(messages: list[dict[str, Any]], trim: bool) -> None:
    tokenizer = byte_level(trim=trim)
    sequence = encode(tokenizer, messages)
    answered = messages[-1]["role"] == "assistant"
    prompt = messages[:-1] if answered else messages
    assert prompt_ids(sequence) == serving(tokenizer, prompt)

    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered)
    assert tokenizer.decode(sequence.ids) == (whole.removesuffix("\n") if answered else whole)
    expected = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    found = supervised(tokenizer, sequence)
    assert len(found) == len(expected)
    if answered:
        assert found[-1] == expected[-1]
    for turn, content in zip(found, expected, strict=True):
        # A leading newline may belong to a token that the generation prompt's own newline began.
        assert turn == content or (content[0] == "\n" and content.endswith(turn))


@settings(max_examples=60)
@given(messages=conversations())
@example(messages=[user(MARKER), assistant(""), user("")])
@example(messages=[user(""), assistant(MARKER), user(""), assistant("")])
def test_any_conversation_keeps_its_prompt_in_a_template_that_strips(messages: list[dict[str, Any]]) -> None:
    tokenizer = sentencepiece_like()
    sequence = encode(tokenizer, messages)
    answered = messages[-1]["role"] == "assistant"
    assert prompt_ids(sequence) == serving(tokenizer, messages[:-1] if answered else messages)
    turns = corpus.spans(sequence.mask)
    assert len(turns) == sum(m["role"] == "assistant" for m in messages)
    assert all(sequence.ids[stop - 1] == tokenizer.eos_token_id for _, stop in turns)
    if answered:
        assert sequence.ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]


def prompt_of(template: str, day: datetime.date | None) -> str:
    return ChatTemplate(byte_level(template), day).render([{"role": "user", "content": "a"}]).prompt


@pytest.mark.parametrize(
    "form", ["%d %b %Y", "%Y-%m-%d", "%A, %B %d, %Y", "%-d/%-m/%y", "%Y-%m-%dT%H:%M:%S", "%G week %V, 100 %%"]
)
@pytest.mark.parametrize("begins", ["", "\n", "  {% if true %}\n  {% endif %}"])
def test_a_template_that_prints_the_date_prints_the_day_it_is_given(form: str, begins: str) -> None:
    printed = (f"strftime_now({form!r})", repr(DAY.strftime(form)))
    dated, plain = (begins + "{{ " + text + " }}" + families.CHATML for text in printed)
    assert prompt_of(dated, DAY) == prompt_of(plain, DAY)


def test_without_a_day_such_a_template_is_refused_by_name() -> None:
    with pytest.raises(CorpusError, match=r"prints the date, and data\.date is null: set it"):
        ChatTemplate(byte_level(DATED), None)
    ChatTemplate(byte_level(families.CHATML), None)

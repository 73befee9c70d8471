"""Parquet -> tokens and masks, with templates and tokenizers of several families, and every kind of bad input."""

from __future__ import annotations

import datetime
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from spec import corpus
from spec.corpus import ChatTemplate, CorpusError, Report, TokenSequence

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
# The generation prompt ends in a space, which byte-level tokens carry at the front of the next word.
SPACE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'BOT: ' + message['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ 'HUMAN: ' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'BOT: ' }}{% endif %}"
)
# Thoughts are rendered for the last turn alone, and history is closed by another token (Qwen 3, gpt-oss).
THINK = (
    "{% for message in messages %}"
    "{% if message['role'] != 'assistant' %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% elif loop.last %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message['content'] + '<|endoftext|>' }}"
    "{% else %}{{ '<|im_start|>assistant\n' + message['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt opens a thought that no ready answer continues (DeepSeek R1's distillates).
FORCED_THINK = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
# No special token closes an answer (Alpaca).
UNCLOSED = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + ':\n' + message['content'] + '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
SENTENCES = [
    "hello there, how are you today?",
    "the answer is 42 ### 42",
    "def f(x):\n    return x\n\n\n",
    "a\n\nb\n\n\n\nc",
]


@cache
def _model(trim: bool, rstrip: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", AddedToken("<|im_end|>", rstrip=rstrip, special=True)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, show_progress=False, special_tokens=special, initial_alphabet=alphabet, max_token_length=8
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    if trim:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def byte_level(template: str | None = CHATML, *, trim: bool = False, rstrip: bool = False, **special: str) -> Any:
    """A byte-level BPE tokenizer, whose tokens reach across words and newlines."""
    special = special or {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    model = Tokenizer.from_str(_model(trim, rstrip).to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **special)
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece_like(template: str | None = LLAMA2) -> Any:
    """A tokenizer in Llama 2's manner: a space before every text, bytes for what it lacks, BOS before plain text."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    for piece in [*"▁abcdefghijklmnopqrstuvwxyzABHIMNOSTUY[]/<>:.?", "▁H", "▁Hi", "▁a", "▁b"]:
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(
        models.BPE(vocab, [("▁", "H"), ("▁H", "i"), ("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    return fast


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str | None) -> dict[str, str | None]:
    return {"role": "assistant", "content": content}


def encode(tokenizer: Any, messages: list[dict[str, Any]]) -> TokenSequence:
    template = ChatTemplate(tokenizer)
    ids, mask, prompt_length = template.encode([template.render(messages)], ["row 0"])[0]
    return TokenSequence(ids, mask, "d", prompt_length)


def supervised(tokenizer: Any, sequence: TokenSequence) -> list[str]:
    """The text of each supervised run."""
    return [tokenizer.decode(sequence.ids[a:b]) for a, b in corpus.spans(sequence.mask)]


def serving(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    """The tokens that serving feeds for a prompt."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    return list(ids)


def prompt_ids(sequence: TokenSequence) -> list[int]:
    return sequence.ids[: sequence.prompt_length].tolist()


def save(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def run(files: Path | list[Path], tokenizer: Any = None, **options: Any) -> tuple[list[TokenSequence], Report]:
    defaults = {
        "prompt_key": None,
        "response_key": None,
        "max_length": 1024,
        "max_samples": None,
        "need_answers": False,
    }
    files = [files] if isinstance(files, Path) else files
    report = Report()
    sequences = corpus.stream(files, tokenizer or byte_level(), report=report, **{**defaults, **options})
    return list(sequences), report


# The mask, template by template ---------------------------------------------------------------------------------


def test_chatml_supervises_the_answer_and_its_end_but_not_the_newline_after_it() -> None:
    tokenizer = byte_level()
    sequence = encode(tokenizer, [user("how are you?"), assistant("hello there")])
    assert supervised(tokenizer, sequence) == ["hello there<|im_end|>"]
    assert tokenizer.decode(sequence.ids).endswith("<|im_start|>assistant\nhello there<|im_end|>")
    assert prompt_ids(sequence) == serving(tokenizer, [user("how are you?")])
    assert corpus.answer(sequence).tolist() == sequence.ids[sequence.mask == 1].tolist()


def test_every_turn_of_a_conversation_is_supervised_and_the_prompt_reaches_to_the_last() -> None:
    tokenizer = byte_level()
    messages = [user("a"), assistant("the answer is 42"), user("b"), assistant(""), user("c"), assistant("x")]
    sequence = encode(tokenizer, messages)
    assert supervised(tokenizer, sequence) == ["the answer is 42<|im_end|>", "<|im_end|>", "x<|im_end|>"]
    assert prompt_ids(sequence) == serving(tokenizer, messages[:-1])
    assert tokenizer.decode(corpus.answer(sequence)) == "x<|im_end|>"


def test_default_and_own_system_messages_are_part_of_the_prompt() -> None:
    tokenizer = byte_level()
    assert tokenizer.decode(encode(tokenizer, [user("a"), assistant("b")]).ids).startswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n"
    )
    messages = [{"role": "system", "content": ""}, user("a"), assistant("b")]
    sequence = encode(tokenizer, messages)
    assert tokenizer.decode(sequence.ids).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")
    assert supervised(tokenizer, sequence) == ["b<|im_end|>"]
    assert prompt_ids(sequence) == serving(tokenizer, messages[:-1])


def test_an_answer_that_is_to_be_written_leaves_only_the_prompt() -> None:
    tokenizer = byte_level()
    messages = [user("a"), assistant("b"), user("c")]
    sequence = encode(tokenizer, messages)
    assert sequence.prompt_length == len(sequence)
    assert sequence.ids.tolist() == serving(tokenizer, messages)
    assert supervised(tokenizer, sequence) == ["b<|im_end|>"]
    assert corpus.answer(sequence).tolist() == []


def test_an_answer_that_merges_with_its_prompt_continues_from_the_tokens_that_serving_feeds() -> None:
    tokenizer = byte_level()
    prompt = "<|im_start|>assistant\n"
    assert (
        tokenizer(prompt + "\n\nc")["input_ids"][: len(tokenizer(prompt)["input_ids"])]
        != tokenizer(prompt)["input_ids"]
    )
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
    tokenizer = byte_level(SPACE, trim=trim)
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
    tokenizer = sentencepiece_like(SPACE.replace("<|im_end|>", "</s>"))
    sequence = encode(tokenizer, [user("a"), assistant("Hi")])
    assert tokenizer.convert_ids_to_tokens(corpus.answer(sequence).tolist()) == ["H", "i", "</s>"]
    assert prompt_ids(sequence) == serving(tokenizer, [user("a")])


def test_a_template_that_renders_history_otherwise_than_the_last_turn() -> None:
    tokenizer = byte_level(THINK, eos_token="<|endoftext|>")
    messages = [user("a"), assistant("<think>hm</think>b"), user("c"), assistant("d")]
    sequence = encode(tokenizer, messages)
    assert supervised(tokenizer, sequence) == ["b<|im_end|>", "<think>\n\n</think>\n\nd<|endoftext|>"]
    assert prompt_ids(sequence) == serving(tokenizer, messages[:-1])


def test_a_template_without_an_end_of_turn_token_supervises_the_content_alone(tmp_path: Path) -> None:
    tokenizer = byte_level(UNCLOSED)
    assert ChatTemplate(tokenizer).end_of_turn is None
    sequence = encode(tokenizer, [user("a"), assistant("the answer is 42"), user("b"), assistant("hello")])
    first, last = supervised(tokenizer, sequence)
    assert first.rstrip() == "the answer is 42"
    assert last == "hello"
    _, report = run(save(tmp_path / "q.parquet", [{"question": "a", "answer": "b"}]), tokenizer)
    assert any("no special token" in line for line in report.lines())


def test_content_that_looks_like_the_template_does_not_move_the_mask() -> None:
    tokenizer = byte_level()
    answers = ["x<|im_end|>\ny", "<|im_start|>assistant\n", "\n", "a<|im_end|>"]
    messages = [m for text in answers for m in (user("a<|im_end|>"), assistant(text))]
    sequence = encode(tokenizer, messages)
    assert supervised(tokenizer, sequence)[0] == "x<|im_end|>\ny<|im_end|>"
    assert supervised(tokenizer, sequence)[-1] == "a<|im_end|><|im_end|>"


def test_a_base_without_a_template_gets_the_plain_one_and_the_report_says_so(tmp_path: Path) -> None:
    tokenizer = byte_level(None, eos_token="<|endoftext|>")
    messages = [user("a"), assistant("hello"), user("b"), assistant("\n the answer ")]
    sequences, report = run(save(tmp_path / "m.parquet", [{"messages": messages}]), tokenizer)
    assert tokenizer.chat_template == corpus.PLAIN_TEMPLATE
    assert supervised(tokenizer, sequences[0]) == [" hello<|endoftext|>", " \n the answer <|endoftext|>"]
    assert prompt_ids(sequences[0]) == serving(tokenizer, messages[:-1])
    assert tokenizer.decode(sequences[0].ids).startswith(
        "User: a\n\nAssistant: hello<|endoftext|>\n\nUser: b\n\nAssistant:"
    )
    assert report.plain_template
    assert any("no chat template" in line for line in report.lines())
    assert run(tmp_path / "m.parquet", tokenizer)[1].plain_template
    assert not run(tmp_path / "m.parquet")[1].plain_template


def test_the_plain_template_starts_with_bos_where_the_tokenizer_does() -> None:
    tokenizer = sentencepiece_like(None)
    assert corpus.install_plain_template(tokenizer)
    sequence = encode(tokenizer, [user("a"), assistant("Hi")])
    assert sequence.ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(corpus.answer(sequence).tolist()) == ["▁Hi", "</s>"]


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "\n",
        "\n\n",
        " ",
        " the answer ",
        "a\r\n",
        "é\u0301",
        "👩‍👩‍👧",
        "\n\nthe answer is 42\n",
        "<think>",
        "def f(x):\n    ",
    ]
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    system = draw(st.none() | text)
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for _ in range(draw(st.integers(1, 3))):
        messages += [user(draw(text)), assistant(draw(text))]
    return messages if draw(st.booleans()) else messages[:-1]


@settings(max_examples=150)
@given(messages=conversations(), trim=st.booleans())
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


@given(st.lists(st.integers(0, 1), max_size=20))
def test_spans_are_the_maximal_runs_of_ones(mask: list[int]) -> None:
    rebuilt = np.zeros(len(mask), dtype=np.uint8)
    found = corpus.spans(np.array(mask, dtype=np.uint8))
    for start, stop in found:
        assert start < stop
        rebuilt[start:stop] = 1
    assert rebuilt.tolist() == mask
    assert all(before[1] < after[0] for before, after in pairwise(found))


# Layouts ----------------------------------------------------------------------------------------------------------

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [user("how?")],
    "ability": "math",
    "reward_model": {"ground_truth": "42", "style": "rule"},
    "extra_info": {"answer": "the answer is 42", "index": 0, "question": "how are you?", "split": "train"},
}


@pytest.mark.parametrize(
    ("row", "options", "prompt", "expected"),
    [
        ({"messages": [user("a"), assistant("b")], "prompt": "x", "answer": "y"}, {}, "a", "b"),
        ({"question": "a", "answer": "b"}, {}, "a", "b"),
        ({"prompt": "a", "response": "b"}, {}, "a", "b"),
        ({"instruction": "a", "output": "b"}, {}, "a", "b"),
        ({"prompt": [user("a")], "completion": "b"}, {}, "a", "b"),
        ({"prompt": [user("a"), assistant("b")]}, {}, "a", "b"),
        ({"prompt": [user("a"), assistant("b")], "answer": None}, {}, "a", "b"),
        ({"question": "a", "answer": ["b", "c"]}, {}, "a", "b"),
        ({"question": "a", "answer": True, "output": "b"}, {}, "a", "b"),
        ({"prompt": "a", "question": "q", "answer": "b"}, {"prompt_key": "question"}, "q", "b"),
        ({"q": "a", "r": "b"}, {"prompt_key": "q", "response_key": "r"}, "a", "b"),
        ({"chat": [user("a")], "r": {"text": ["b"]}}, {"prompt_key": "chat", "response_key": "r.text"}, "a", "b"),
        ({"messages": [user("a")], "r": "b"}, {"response_key": "r"}, "a", "b"),
        ({"q.a": "a", "q": {"a": "x"}, "r": "b"}, {"prompt_key": "q.a", "response_key": "r"}, "a", "b"),
        (VERL, {}, "how?", "the answer is 42"),
        (VERL, {"prompt_key": "prompt", "response_key": "extra_info.answer"}, "how?", "the answer is 42"),
        (VERL, {"prompt_key": "extra_info.question"}, "how are you?", "the answer is 42"),
    ],
)
def test_layouts(tmp_path: Path, row: dict[str, Any], options: dict[str, str], prompt: str, expected: str) -> None:
    tokenizer = byte_level()
    sequences, _ = run(save(tmp_path / "x.parquet", [row, row]), tokenizer, need_answers=True, **options)
    assert len(sequences) == 2
    for sequence in sequences:
        assert prompt_ids(sequence) == serving(tokenizer, [user(prompt)])
        assert supervised(tokenizer, sequence) == [expected + "<|im_end|>"]


def test_plain_text_is_supervised_throughout_with_the_tokenizers_own_bos(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like(None)
    path = save(tmp_path / "t.parquet", [{"text": "Hi a"}, {"text": ""}])
    sequences, report = run(path, tokenizer, need_answers=True)
    assert [s.ids.tolist() for s in sequences] == [tokenizer("Hi a")["input_ids"]]
    assert sequences[0].ids[0] == tokenizer.bos_token_id
    assert sequences[0].mask.all()
    assert sequences[0].prompt_length == 0
    assert (report.kept, report.empty, report.plain_template) == (1, 1, False)
    assert tokenizer.chat_template is None


def test_files_of_several_layouts_keep_their_order(tmp_path: Path) -> None:
    files = [save(tmp_path / "b.parquet", [{"text": "hello"}]), save(tmp_path / "a.parquet", [{"question": "a"}])]
    sequences, report = run(files)
    assert [s.domain for s in sequences] == ["b", "a"]
    assert list(report.layouts) == files
    assert (report.rows, report.kept, report.unanswered) == (2, 2, 1)


def test_the_domain_is_a_column_or_the_files_stem(tmp_path: Path) -> None:
    def domains(name: str, **columns: Any) -> list[str]:
        rows = [{"question": "a", **columns}, {"question": "b", **dict.fromkeys(columns)}]
        return [s.domain for s in run(save(tmp_path / name, rows))[0]]

    assert domains("x.parquet", domain="maths", data_source="s") == ["maths", "x"]
    assert domains("y.parquet", domain=3, data_source="s") == ["s", "y"]
    assert domains("z.parquet") == ["z", "z"]


def test_rows_without_an_answer_are_welcome_when_the_base_writes_it(tmp_path: Path) -> None:
    tokenizer = byte_level()
    rows = [
        {"messages": [user("a"), assistant("b"), user("c")]},
        {"messages": [user("a"), assistant(None)]},
        {"messages": [user("a"), assistant(" ")]},
        {"messages": [user("a"), assistant("b")]},
    ]
    sequences, report = run(save(tmp_path / "m.parquet", rows), tokenizer)
    assert [s.prompt_length == len(s) for s in sequences] == [True, True, True, False]
    assert prompt_ids(sequences[1]) == prompt_ids(sequences[3]) == serving(tokenizer, [user("a")])
    assert (report.rows, report.kept, report.unanswered) == (4, 4, 3)


def test_the_report_counts_what_was_kept(tmp_path: Path) -> None:
    tokenizer = byte_level()
    rows = [{"question": "a", "answer": "b", "domain": "x"}, {"question": "a", "answer": "bb" * 50, "domain": "y"}]
    done: list[int] = []
    sequences, report = run(
        save(tmp_path / "q.parquet", rows * 150), tokenizer, max_length=70, need_answers=True, progress=done.append
    )
    assert len(sequences) == 150
    assert (report.rows, report.kept, report.too_long, report.unanswered) == (300, 150, 150, 0)
    assert report.tokens == sum(map(len, sequences))
    assert report.supervised == sum(int(s.mask.sum()) for s in sequences)
    assert report.domains == {"x": 150}
    assert report.end_of_turn == "<|im_end|>"
    assert report.lines()[0] == f"{tmp_path / 'q.parquet'}: prompts in question, answers in answer, domain from domain"
    assert "150 rows dropped: longer than max_length" in report.lines()
    assert report.lines()[-1].startswith("150 of 300 rows kept")
    assert done == [256, 44]


def test_limits_are_exact(tmp_path: Path) -> None:
    tokenizer = byte_level()
    path = save(tmp_path / "q.parquet", [{"question": "a", "answer": "b"}])
    (sequence,), _ = run(path, tokenizer)
    prompt, total = sequence.prompt_length, len(sequence)
    assert len(run(path, tokenizer, max_length=total, need_answers=True)[0][0]) == total
    with pytest.raises(CorpusError, match=rf"needs {total} tokens, data.max_length is {total - 1}"):
        run(path, tokenizer, max_length=total - 1, need_answers=True)
    # The base writes the answer: the row stays as long as its prompt leaves room for one token.
    (short,), report = run(path, tokenizer, max_length=total - 1)
    assert len(short) == short.prompt_length == prompt
    assert (report.shortened, report.unanswered) == (1, 0)
    assert prompt + 1 == total - 1
    with pytest.raises(CorpusError, match="no row of"):
        run(path, tokenizer, max_length=prompt)


def test_max_samples_takes_the_first_rows_of_all_files(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{n}.parquet", [{"question": "a"}] * 3) for n in "ab"]
    sequences, report = run(files, max_samples=4)
    assert [s.domain for s in sequences] == ["a", "a", "a", "b"]
    assert report.rows == 4
    sources = corpus.inspect(files, prompt_key=None, response_key=None, need_answers=False)
    assert (corpus.count_rows(sources, 4), corpus.count_rows(sources, None)) == (4, 6)


def test_a_template_with_no_place_for_ready_answers_still_serves_prompts(tmp_path: Path) -> None:
    path = save(tmp_path / "q.parquet", [{"question": "a", "answer": "b"}])
    tokenizer = byte_level(FORCED_THINK)
    (sequence,), report = run(path, tokenizer)
    assert sequence.ids.tolist() == serving(tokenizer, [user("a")])
    assert report.shortened == 1
    with pytest.raises(CorpusError, match=r"q.parquet, row 0: the chat template does not render assistant message 1"):
        run(path, tokenizer, need_answers=True)
    several = save(tmp_path / "m.parquet", [{"messages": [user("a"), assistant("b"), user("c")]}])
    with pytest.raises(CorpusError, match=r"m.parquet, row 0: the chat template does not render assistant message 1"):
        run(several, tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(FORCED_THINK, id="the generation prompt is no prefix"),
        pytest.param(CHATML.replace("message['content']", "'a'"), id="the content is not rendered"),
        pytest.param(CHATML.replace("'<|im_end|>'", "'<|im_end|>' ~ message['content']|length"), id="the end varies"),
        pytest.param(CHATML.replace("message['role']", "'model'", 1), id="another name"),
    ],
)
def test_a_prefix_that_does_not_hold_is_an_error(template: str) -> None:
    with pytest.raises(corpus.PrefixError, match="does not render assistant message 1"):
        ChatTemplate(byte_level(template)).render([user("a"), assistant("a long answer, longer than its prompt" * 3)])


# Files --------------------------------------------------------------------------------------------------------------


def test_list_files_takes_files_and_folders(tmp_path: Path) -> None:
    a, b = (save(tmp_path / "f" / name, [{"text": "a"}]) for name in ("b/x.parquet", "a.parquet"))
    save(tmp_path / "f" / ".hidden.parquet", [{"text": "a"}])
    c = save(tmp_path / "c.data", [{"text": "a"}])
    assert corpus.list_files([str(c), str(tmp_path / "f")]) == [c, b, a]


def test_list_files_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no data file is named"):
        corpus.list_files([])
    with pytest.raises(CorpusError, match=r"nowhere.parquet: no such file or folder"):
        corpus.list_files([str(tmp_path / "nowhere.parquet")])
    with pytest.raises(CorpusError, match=r"the folder has no \*.parquet file"):
        corpus.list_files([str(tmp_path)])


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, r"x.parquet: the file has no rows"),
        ([{"id": 1}], {}, r"no layout fits its columns: found id \(int64\).*messages.*question.*text"),
        ([{"messages": "a"}], {}, r"no layout fits its columns: found messages \(string\)"),
        (
            [{"messages": [{"role": "user", "content": ["a"]}]}],
            {},
            r"no layout fits its columns: found messages \(list",
        ),
        ([{"text": "a", "r": "b"}], {"response_key": "r"}, r"no layout fits.*data.prompt_key"),
        ([{"q": "a"}], {"prompt_key": "p"}, r"no column 'p', which data.prompt_key names: found q \(string\)"),
        ([{"q": {"a": "b"}}], {"prompt_key": "q.b"}, r"no column 'q.b', which data.prompt_key names: found q \(struct"),
        ([{"question": "a"}], {"response_key": "r"}, r"no column 'r', which data.response_key names"),
        ([{"q": 1}], {"prompt_key": "q"}, r"column 'q', which data.prompt_key names, is int64; expected a string or"),
        ([{"question": "a", "answer": 1}], {"response_key": "answer"}, r"is int64; expected a string or a list of st"),
        ([{"question": "a"}], {"need_answers": True}, r"answers are needed, but no column.*respond.source=base"),
        ([{"question": "a"}, {"question": None}], {}, r"x.parquet, row 1: column question is null"),
        ([{"question": None}], {}, r"x.parquet, row 0: column question is null"),
        ([{"extra_info": None}, {"extra_info": {"q": "a"}}], {"prompt_key": "extra_info.q"}, r"row 0: column extra_i"),
        ([{"text": "a b"}, {"text": None}], {}, r"x.parquet, row 1: column text is null"),
        ([{"messages": None}, {"messages": [user("a")]}], {}, r"row 0: column messages is null"),
        ([{"messages": [user("a")]}, {"messages": []}], {}, r"row 1: column messages has no messages"),
        ([{"messages": [{"role": "user", "content": None}, user("")]}], {}, r"row 0: message 0 .* has content None"),
        ([{"messages": [{"role": None, "content": "a"}, user("")]}], {}, r"row 0: message 0 .* has role None"),
        ([{"messages": [assistant("a"), user("b")]}], {}, r"row 0: column messages starts with an assistant turn"),
        ([{"prompt": [user("a"), assistant("b")], "answer": "c"}], {}, r"row 0: column prompt ends with an assistant"),
        (
            [{"question": "a", "answer": "b"}, {"question": "a", "answer": None}],
            {"need_answers": True},
            r"row 1: the answer in answer is null",
        ),
        (
            [{"question": "a", "answer": " \n"}],
            {"need_answers": True},
            r"x.parquet, row 0: the answer in answer is empty",
        ),
        (
            [{"question": "a", "answer": ["b"]}, {"question": "a", "answer": []}],
            {"need_answers": True},
            r"row 1: the answer in answer is null",
        ),
        ([{"messages": [user("a"), assistant("")]}], {"need_answers": True}, r"row 0: the answer in messages is empty"),
        ([{"messages": [user("a")]}], {"need_answers": True}, r"row 0: no answer follows the prompt"),
        (
            [{"question": "a b"}],
            {"max_length": 4},
            r"no row of .*x.parquet can be used \(1 read\): the shortest needs \d+",
        ),
        ([{"text": ""}], {}, r"no row of .* can be used \(1 read\): all are empty"),
    ],
)
def test_bad_rows(tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], message: str) -> None:
    schema = None if rows else pa.schema([("question", pa.string())])
    with pytest.raises(CorpusError, match=message):
        run(save(tmp_path / "x.parquet", rows, schema), **options)


def test_columns_are_checked_in_every_file_before_any_row_is_read(tmp_path: Path) -> None:
    files = [save(tmp_path / "a.parquet", [{"question": None}]), save(tmp_path / "b.parquet", [{"id": 1}])]
    with pytest.raises(CorpusError, match=r"b.parquet: no layout fits"):
        run(files)


def test_the_templates_own_error_comes_with_file_and_row(tmp_path: Path) -> None:
    good, bad = [user("a"), assistant("b")], [user("a"), user("b"), assistant("c")]
    path = save(tmp_path / "m.parquet", [{"messages": good}, {"messages": bad}])
    with pytest.raises(CorpusError, match=r"m.parquet, row 1: the chat template refuses .* must alternate"):
        run(path, sentencepiece_like())


@pytest.mark.parametrize("content", [b"", b"PAR1 not really", b'{"question": "a"}\n'])
def test_files_that_are_not_parquet(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"x.parquet: not a readable parquet file"):
        run(path)
    with pytest.raises(CorpusError, match=r"x.parquet: not a readable parquet file"):
        corpus.read(path)


def test_write_and_read_give_the_same_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sequences = [
        TokenSequence(
            rng.integers(0, 2**31, n, dtype=np.int32),
            rng.integers(0, 2, n, dtype=np.uint8),
            f"d{n % 3}",
            n // 2,
            rng.bytes(16),
        )
        for n in rng.integers(0, 40, 1500)
    ]
    path = tmp_path / "new" / "x.parquet"
    assert corpus.write(path, iter(sequences)) == 1500
    back = corpus.read(path)
    assert [(s.ids.tolist(), s.mask.tolist(), s.domain, s.prompt_length, s.source) for s in back] == [
        (s.ids.tolist(), s.mask.tolist(), s.domain, s.prompt_length, s.source) for s in sequences
    ]
    assert back[0].ids.dtype == np.int32
    assert back[0].mask.dtype == np.uint8
    assert all(s.ids.flags.writeable for s in back)
    assert pq.read_schema(path).names == ["ids", "mask", "domain", "prompt_length", "source"]
    first = path.read_bytes()
    corpus.write(path, sequences)
    assert path.read_bytes() == first
    assert corpus.write(path, []) == 0
    assert corpus.read(path) == []


def test_a_file_says_what_it_was_made_with(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    sequences = [TokenSequence(np.arange(3, dtype=np.int32), np.ones(3, np.uint8), "d", 1)]
    origin = {"tokenizer": "0" * 64, "temperature": 0.5, "seed": None, "source": "bäse"}
    corpus.write(path, sequences, origin)
    assert corpus.read_origin(path) == origin
    assert len(corpus.read(path)) == 1
    once = path.read_bytes()
    corpus.write(path, iter(sequences), dict(origin))
    assert path.read_bytes() == once
    corpus.write(path, sequences, {**origin, "seed": 1})
    assert corpus.read_origin(path) == {**origin, "seed": 1}
    assert path.read_bytes() != once  # another origin is another file to DVC
    corpus.write(path, [], origin)
    assert (corpus.read_origin(path), corpus.read(path)) == (origin, [])


def test_a_file_that_was_told_no_origin_has_none(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    corpus.write(path, [])
    assert corpus.read_origin(path) == {}
    assert corpus.read_origin(save(tmp_path / "q.parquet", [{"question": "a"}])) == {}


@pytest.mark.parametrize("content", [b"", b"PAR1 not really"])
def test_the_origin_of_what_is_no_parquet_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(CorpusError, match=r"x.parquet: no such file; the stage that writes it has not run"):
        corpus.read_origin(path)
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"x.parquet: not a readable parquet file"):
        corpus.read_origin(path)


@pytest.mark.parametrize("origin", [b"{", b"", b"\xff"])
def test_an_origin_that_is_none_is_an_error(tmp_path: Path, origin: bytes) -> None:
    path = tmp_path / "x.parquet"
    schema = pa.schema([("ids", pa.int32())]).with_metadata({b"origin": origin})
    pq.write_table(pa.table({"ids": pa.array([], pa.int32())}, schema=schema), path)
    with pytest.raises(CorpusError, match=r"x\.parquet: not a readable parquet file"):
        corpus.read_origin(path)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = save(tmp_path / "q.parquet", [{"question": "a"}] * 300 + [{"question": None}])
    out = tmp_path / "out" / "x.parquet"
    options = {"prompt_key": None, "response_key": None, "max_length": 99, "max_samples": 300, "need_answers": False}
    assert corpus.write(out, corpus.stream([path], byte_level(), **options, report=Report())) == 300
    before = out.read_bytes()
    options["max_samples"] = None
    with pytest.raises(CorpusError, match="row 300"):
        corpus.write(out, corpus.stream([path], byte_level(), **options, report=Report()))
    assert out.read_bytes() == before
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, r"found columns ids \(list<.*int32>\), domain \(string\).*expected ids"),
        ({"ids": pa.array([[1, 2]], pa.list_(pa.int64()))}, r"found columns ids \(list<.*int64>\)"),
        ({"mask": pa.array([[1]], pa.list_(pa.uint8()))}, "ids and mask differ in length"),
        ({"prompt_length": pa.array([3], pa.int32())}, "prompt_length 3 do not fit"),
        ({"domain": pa.array([None], pa.string())}, "it has nulls"),
    ],
)
def test_read_refuses_other_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    columns = {
        "ids": pa.array([[1, 2]], pa.list_(pa.int32())),
        "mask": pa.array([[0, 1]], pa.list_(pa.uint8())),
        "domain": pa.array(["d"]),
        "prompt_length": pa.array([1], pa.int32()),
        "source": pa.array([b""]),
    }
    columns = {name: column for name, column in {**columns, **change}.items() if column is not None}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match=message):
        corpus.read(tmp_path / "x.parquet")


def test_read_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"x.parquet: no such file"):
        corpus.read(tmp_path / "x.parquet")


def test_a_sequence_whose_parts_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        TokenSequence(np.zeros(2, np.int32), np.zeros(3, np.uint8), "d", 1)


def test_the_module_loads_without_torch() -> None:
    code = "import sys, spec.corpus; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


DAY = datetime.date(2026, 3, 7)
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\n' }}" + CHATML


def prompt_of(template: str, day: datetime.date | None) -> str:
    return ChatTemplate(byte_level(template), day).render([{"role": "user", "content": "a"}]).prompt


@pytest.mark.parametrize(
    "form", ["%d %b %Y", "%Y-%m-%d", "%A, %B %d, %Y", "%-d/%-m/%y", "%Y-%m-%dT%H:%M:%S", "%G week %V, 100 %%"]
)
@pytest.mark.parametrize("begins", ["", "\n", "  {% if true %}\n  {% endif %}"])
def test_a_template_that_prints_the_date_prints_the_day_it_is_given(form: str, begins: str) -> None:
    dated, plain = (
        begins + "{{ " + text + " }}" + CHATML for text in (f"strftime_now({form!r})", repr(DAY.strftime(form)))
    )
    assert prompt_of(dated, DAY) == prompt_of(plain, DAY)


def test_without_a_day_such_a_template_is_refused_by_name() -> None:
    with pytest.raises(CorpusError, match=r"prints the date, and data\.date is null: set it"):
        ChatTemplate(byte_level(DATED), None)
    ChatTemplate(byte_level(CHATML), None)

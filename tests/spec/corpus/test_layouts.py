"""Columns of parquet files -> conversations and plain text."""

import json
from pathlib import Path
from typing import Any

import pytest

from spec import corpus
from spec.corpus import CorpusError

from . import families
from .families import assistant, byte_level, prompt_ids, run, save, serving, supervised, user

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [user("how?")],
    "ability": "math",
    "reward_model": {"ground_truth": "42", "style": "rule"},
    "extra_info": {"answer": "the answer is 42", "index": 0, "question": "how are you?", "split": "train"},
}
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
CALLING = [{"from": "function_call", "value": "f()"}, {"from": "observation", "value": "c"}]
SHAREGPT_CALL = [SHAREGPT[0], *CALLING, SHAREGPT[1]]
BE_S = {"role": "system", "content": "s"}
ULTRACHAT = {"prompt": " a ", "prompt_id": "0f", "messages": [user("a"), assistant("b")]}
OPENHERMES = {
    **{"system_prompt": None, "custom_instruction": None, "model_name": None, "conversations": SHAREGPT, "source": "x"},
    **{"skip_prompt_formatting": False, "topic": None, "idx": "0", "views": 1.0, "language": None},
}
MAGPIE = {"instruction": "a", "response": "b", "conversations": SHAREGPT, "intent": "x", "input_quality": "good"}
CALL = {"name": "f", "arguments": json.dumps({"x": "y"})}
CALLED = [user("a"), {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]}]


def parts(*texts: str) -> list[dict[str, str | None]]:
    """Content as a table holds it when other rows have images."""
    return [{"type": "text", "text": text, "image_url": None} for text in texts]


@pytest.mark.parametrize(
    ("row", "options", "prompt", "expected"),
    [
        ({"messages": [user("a"), assistant("b")], "prompt": "a", "answer": "y"}, {}, "a", "b"),
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
        ({"messages": [user("a"), assistant("b")]}, {"prompt_key": "messages"}, "a", "b"),
        ({"conversations": SHAREGPT}, {}, "a", "b"),
        ({"conversation": SHAREGPT}, {"prompt_key": "conversation"}, "a", "b"),
        ({"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}}, {}, "a", "b"),
        ({"chat": [{"role": "Human", "text": "a"}, {"role": "chatgpt", "text": "b"}]}, {}, "a", "b"),
        ({"messages": json.dumps(SHAREGPT)}, {}, "a", "b"),
        ({"messages": json.dumps(SHAREGPT)}, {"prompt_key": "messages"}, "a", "b"),
        ({"prompt": json.dumps([user("a")]), "completion": json.dumps([assistant("b")])}, {}, "a", "b"),
        ({"prompt": json.dumps([user("a"), assistant("b")])}, {}, "a", "b"),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, {}, "a", "b"),
        ({"prompt": "a", "completion": assistant("b")}, {}, "a", "b"),
        ({"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}, {}, "a", "b"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}, {}, "a", "b"),
        ({"messages": [user(parts("a", "b")), {"role": "gpt", "content": parts("b")}]}, {}, "ab", "b"),
        ({"instruction": "a", "input": "c", "output": "b", "text": "a c b"}, {}, "a\n\nc", "b"),
        ({"instruction": "a", "input": "", "output": "b"}, {}, "a", "b"),
        ({"instruction": "a", "context": "c", "response": "b", "category": "d"}, {}, "a\n\nc", "b"),
        ({"q": "a", "context": "c", "r": "b"}, {"prompt_key": "q", "response_key": "r"}, "a\n\nc", "b"),
        ({"instruction": "a", "input": "c", "output": "b"}, {"ignore_columns": ["input"]}, "a", "b"),
        ({"input": "a", "output": "b"}, {}, "a", "b"),
        ({"messages": None, "prompt": None, "question": "a", "answer": None, "output": "b"}, {}, "a", "b"),
        ({"messages": [], "question": "a", "answer": [], "output": "b"}, {}, "a", "b"),
        ({"system_prompt": "s", "question": "a", "response": "b"}, {}, [BE_S, user("a")], "b"),
        ({"system": "s", "conversations": SHAREGPT}, {}, [BE_S, user("a")], "b"),
        ({"system": "s", "messages": [BE_S, user("a"), assistant("b")]}, {}, [BE_S, user("a")], "b"),
        ({"messages": [{"role": "developer", "content": "s"}, user("a"), assistant("b")]}, {}, [BE_S, user("a")], "b"),
        ({"conversations": SHAREGPT_CALL}, {}, [user("a"), assistant("f()"), {"role": "tool", "content": "c"}], "b"),
        ({"conversations": ["a", "b"]}, {}, "a", "b"),
        ({"data": ["a", "b"]}, {"prompt_key": "data"}, "a", "b"),
        ({"messages": [json.dumps(user("a")), json.dumps(assistant("b"))]}, {}, "a", "b"),
        ({"conversation": [{"input": "a", "output": "b"}]}, {}, "a", "b"),
        ({"prompt": user("a"), "response": assistant("b")}, {}, "a", "b"),
        ({"Question": "a", "Complex_CoT": "c", "Response ": "b"}, {}, "a", "b"),
        ({"inputs": "a", "targets": "b"}, {}, "a", "b"),
        ({"question": "a", "answers": {"text": ["b", "c"], "answer_start": [0, 1]}}, {}, "a", "b"),
        ({"problem": "a", "answer": "c", "solution": "b", "problem_is_valid": "Yes"}, {}, "a", "b"),
        ({"instruction": "", "input": "a", "output": "b"}, {}, "a", "b"),
        *(({"conversations": SHAREGPT, "tools": tools}, {}, "a", "b") for tools in ("[]", "null", "{}", " ")),
        ({"messages": [user("a"), {**assistant("b"), "tool_calls": "null"}]}, {}, "a", "b"),
        (ULTRACHAT, {}, "a", "b"),
        (OPENHERMES, {}, "a", "b"),
        (MAGPIE, {}, "a", "b"),
        (VERL, {}, "how?", "the answer is 42"),
        (VERL, {"prompt_key": "prompt", "response_key": "extra_info.answer"}, "how?", "the answer is 42"),
        (VERL, {"prompt_key": "extra_info.question"}, "how are you?", "the answer is 42"),
    ],
)
def test_layouts(tmp_path: Path, row: dict[str, Any], options: dict[str, Any], prompt: Any, expected: str) -> None:
    tokenizer = byte_level()
    sequences, _ = run(save(tmp_path / "x.parquet", [row, row]), tokenizer, need_answers=True, **options)
    assert len(sequences) == 2
    for sequence in sequences:
        assert prompt_ids(sequence) == serving(tokenizer, prompt if isinstance(prompt, list) else [user(prompt)])
        assert tokenizer.decode(corpus.answer(sequence)) == expected + "<|im_end|>"


def test_plain_text_is_supervised_throughout_with_the_tokenizers_own_bos(tmp_path: Path) -> None:
    tokenizer = families.sentencepiece_like(None)
    path = save(tmp_path / "t.parquet", [{"text": "Hi a"}, {"text": ""}])
    sequences, report = run(path, tokenizer, need_answers=True)
    assert [s.ids.tolist() for s in sequences] == [tokenizer("Hi a")["input_ids"]]
    assert sequences[0].ids[0] == tokenizer.bos_token_id
    assert sequences[0].mask.all()
    assert sequences[0].prompt_length == 0
    assert (report.kept, report.empty, report.plain_template) == (1, 1, False)
    assert tokenizer.chat_template is None


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


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"messages": [user("a")], "system_message": "b", "system": "c"}, "system_message"),
        ({"messages": [user("a")], "prompt": "b"}, "prompt"),
        ({"question": "a", "history": [["b", "c"]]}, "history"),
        ({"question": "a", "userPrompt": "b"}, "userPrompt"),
        ({"question": "a", "retrieved_documents": [{"title": "b"}]}, "retrieved_documents"),
        ({"prompt": [user("a")], "images": [{"bytes": b"b", "path": None}]}, "images"),
        ({"prompt": [user("a")], "context": "b"}, "context"),
        ({"prompt": json.dumps([user("a")]), "input": "b"}, "input"),
        ({"text": "a c", "context": "b"}, "context"),
        ({"Text": "a c", "code": "b"}, "code"),
        ({"text": "a c", "role": "prompter"}, "role"),
    ],
)
def test_nothing_that_belongs_to_the_prompt_is_lost(tmp_path: Path, row: dict[str, Any], column: str) -> None:
    path = save(tmp_path / "x.parquet", [{**row, column: None}, row])
    with pytest.raises(CorpusError, match=rf"x.parquet, row 1: column {column} looks like .*data\.ignore_columns"):
        run(path, skip_bad_rows=True)
    assert len(run(path, ignore_columns=[column])[0]) == 2
    assert len(run(save(path, [{**row, column: None}]))[0]) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CALLED, "tools": json.dumps([{"name": "f"}])},
        {"messages": CALLED, "tools": [{"name": "f", "strict": None}]},
        {"query": "a", "answers": json.dumps([CALL]), "tools": json.dumps([{"name": "f"}])},
        {"messages": [user("a"), {"role": "assistant", "tool_calls": json.dumps([CALL])}], "tools": [{"name": "f"}]},
        {"messages": [user("a"), {"role": "assistant", "function_call": CALL}], "functions": [{"name": "f"}]},
        {"conversations": [SHAREGPT[0], {**CALLING[0], "value": json.dumps(CALL)}], "tools": ['{"name": "f"}']},
    ],
)
def test_tools_and_calls_are_read_in_openais_form(tmp_path: Path, row: dict[str, Any]) -> None:
    template = families.CHATML.replace("m.content", "m.content ~ (m.tool_calls or '')")
    tokenizer = byte_level("{{ tools | tojson }}" + template)
    (sequence,), _ = run(save(tmp_path / "x.parquet", [row]), tokenizer)
    assert tokenizer.decode(sequence.ids).startswith('[{"type": "function", "function": {"name": "f"}}]')
    assert "'arguments': {'x': 'y'}" in supervised(tokenizer, sequence)[0]

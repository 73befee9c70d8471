"""Traits of public families of chat templates, one minimal template each."""

from typing import Any

import pytest

from spec.corpus import ChatTemplate, CorpusError
from tests.tiny import template

from .families import assistant, byte_level, encode, supervised, user

HEAD, END = "{{ '<|im_start|>' ~ m.role ~ '\n' }}", "{{ '<|im_end|>\n' }}"
BODY = HEAD + "{{ m.content }}" + END
THOUGHT = (
    "{% set r = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in "
    "m.content else '') %}{% set c = m.content.split('</think>')[-1].lstrip() %}"
)
CALLS = "{% for c in m.tool_calls or [] %}"
ALTERNATE = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
SYSTEM = "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
FAMILIES = {
    "gemma 2 trims, names the model, alternates": template(
        ALTERNATE + "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}" + END,
        "<|im_start|>model\n",
    ),
    "mistral moves the system prompt, has no generation prompt": template(
        "{% if m.role == 'user' %}{{ '[INST]' ~ (s ~ '\n\n' if loop.last and s else '') ~ m.content ~ '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' ~ m.content | trim ~ '<|im_end|>' }}{% endif %}",
        "",
        SYSTEM,
    ),
    "system last, and a line for it": template(
        HEAD + "{% if loop.last and m.role == 'user' %}{{ s ~ '\n' }}{% endif %}{{ m.content }}" + END, before=SYSTEM
    ),
    "qwen 3": template(
        "{% if m.role != 'assistant' %}" + BODY + "{% else %}" + THOUGHT + HEAD + "{% if loop.last %}"
        "{{ '<think>\n' ~ r ~ '\n</think>\n\n' }}{% endif %}{{ c }}" + END + "{% endif %}"
    ),
    "qwen 3 thinking": template(
        "{% if m.role != 'assistant' %}" + BODY + "{% else %}" + THOUGHT + HEAD + "{% if loop.last or r %}"
        "{{ '<think>\n' ~ r ~ '\n</think>\n\n' }}{% endif %}{{ c }}" + END + "{% endif %}",
        "<|im_start|>assistant\n<think>\n",
    ),
    "deepseek r1": template(HEAD + "{{ m.content.split('</think>')[-1] }}" + END, "<|im_start|>assistant\n<think>\n"),
    "nemotron 3": template(
        "{% if m.role != 'assistant' %}" + BODY + "{% else %}" + THOUGHT + HEAD
        + "{{ '<think>' ~ ('\n' ~ r ~ '\n' if r and loop.last else '') ~ '</think>' ~ c }}" + END + "{% endif %}",
        "<|im_start|>assistant\n<think>\n",
    ),
    "gpt-oss": template(
        "{% if m.role != 'assistant' %}" + BODY + "{% else %}<|im_start|>assistant{% if loop.last %}"
        "{% if m.thinking %}{{ ' analysis:' ~ m.thinking ~ '<|im_end|><|im_start|>assistant' }}{% endif %}"
        "{{ ' final:' ~ m.content ~ '<|endoftext|>' }}{% else %}{{ ' final:' ~ m.content ~ '<|im_end|>' }}{% endif %}"
        "{% endif %}",
        "<|im_start|>assistant",
    ),
    "cohere closes turns with two tokens": template(HEAD + "{{ m.content }}<|endoftext|>" + END),
    "phi 4 closes the conversation": template(HEAD + "{{ m.content }}<|im_end|>")
    + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}",
    "qwen 3 with calls": template(
        HEAD + "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}" + CALLS
        + "{{ c.function.name }}{% endfor %}" + END
    ),
    "qwen 2.5 with calls": template(
        "{{ '<|im_start|>' ~ m.role }}{% if m.content %}{{ '\n' ~ m.content }}{% endif %}"
        + CALLS
        + "{{ '\n<tool_call>' ~ c.function.name ~ c.function.arguments | tojson ~ '</tool_call>' }}{% endfor %}" + END
    ),
    "lfm 2.5 with special tokens in calls": template(
        HEAD + "{{ m.content }}" + CALLS + "<|endoftext|>{{ c.function.name }}<|endoftext|>{% endfor %}" + END
    ),
    "deepseek v3 with arguments as text": template(
        HEAD + "{{ m.content or '' }}" + CALLS + "{{ c.function.name + c.function.arguments }}{% endfor %}" + END
    ),
    "content as parts": template(
        HEAD + "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}" + END
    ),
    "no new line after the role": template("{{ '<|im_start|>' ~ m.role ~ m.content }}" + END),
    "empty content is skipped": template("{% if m.content %}" + BODY + "{% endif %}"),
}  # fmt: skip
BE = {"role": "system", "content": "Be."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": "y"}}}]}
CHAT = [user("a"), assistant(" b "), user("c"), assistant("d")]
CALLED = [user("a"), CALL, {"role": "tool", "content": "c"}, assistant("d")]
THINKING = [user("a"), assistant("<think>hm</think>b"), user("c"), assistant("<think>so</think>\n\nd")]
REASONING = [user("a"), {**assistant("d"), "reasoning_content": "so"}]
FUNCTIONS = [{**BE, "functions": "f(x)"}, *CHAT]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


@pytest.mark.parametrize(
    ("family", "messages", "expected", "unplaced"),
    [
        ("gemma 2 trims, names the model, alternates", CHAT, ["b<|im_end|>", "d<|im_end|>"], 0),
        ("mistral moves the system prompt, has no generation prompt", CHAT, [" b<|im_end|>", " d<|im_end|>"], 0),
        ("mistral moves the system prompt, has no generation prompt", [BE, *CHAT], [" d<|im_end|>"], 1),
        ("system last, and a line for it", [BE, *CHAT], ["d<|im_end|>"], 1),
        ("qwen 3", THINKING, ["b<|im_end|>", "<think>\nso\n</think>\n\nd<|im_end|>"], 0),
        ("qwen 3", REASONING, ["<think>\nso\n</think>\n\nd<|im_end|>"], 0),
        ("qwen 3", CHAT, ["b <|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"], 0),
        ("qwen 3 thinking", THINKING, ["hm\n</think>\n\nb<|im_end|>", "so\n</think>\n\nd<|im_end|>"], 0),
        ("qwen 3 thinking", CHAT, ["\n</think>\n\nd<|im_end|>"], 1),
        ("deepseek r1", THINKING, ["so</think>\n\nd<|im_end|>"], 1),
        ("deepseek r1", REASONING, ["so\n</think>\n\nd<|im_end|>"], 0),
        ("nemotron 3", THINKING, ["so\n</think>d<|im_end|>"], 1),
        ("gpt-oss", CHAT, [" final: b <|im_end|>", " final:d<|endoftext|>"], 0),
        ("gpt-oss", REASONING, [" analysis:so<|im_end|><|im_start|>assistant final:d<|endoftext|>"], 0),
        ("cohere closes turns with two tokens", CHAT[2:], ["d<|endoftext|><|im_end|>"], 0),
        ("phi 4 closes the conversation", CHAT, [" b <|im_end|>", "d<|im_end|>"], 0),
        ("qwen 3 with calls", CALLED, ["f<|im_end|>", "<think></think>d<|im_end|>"], 0),
        ("qwen 3 with calls", CALLED[:2], ["<think></think>f<|im_end|>"], 0),
        ("qwen 2.5 with calls", CALLED, ['<tool_call>f{"x": "y"}</tool_call><|im_end|>', "d<|im_end|>"], 0),
        ("qwen 2.5 with calls", CALLED[:2], ['<tool_call>f{"x": "y"}</tool_call><|im_end|>'], 0),
        ("lfm 2.5 with special tokens in calls", CALLED, ["<|endoftext|>f<|endoftext|><|im_end|>", "d<|im_end|>"], 0),
        ("deepseek v3 with arguments as text", CALLED, ['f{"x": "y"}<|im_end|>', "d<|im_end|>"], 0),
        ("content as parts", CHAT, [" b <|im_end|>", "d<|im_end|>"], 0),
        ("no new line after the role", CHAT, ["d<|im_end|>"], 1),
        ("empty content is skipped", [*CHAT, user("")], [" b <|im_end|>", "d<|im_end|>"], 0),
    ],
)  # fmt: skip
def test_families(family: str, messages: list[dict[str, Any]], expected: list[str], unplaced: int) -> None:
    tokenizer = byte_level(FAMILIES[family])
    assert ChatTemplate(tokenizer).render(messages).unplaced == unplaced
    sequence = encode(tokenizer, messages)
    found = supervised(tokenizer, sequence)
    # A token that begins with the space or new line before an earlier turn is not supervised.
    assert [text.lstrip() for text in found[:-1]] == [text.lstrip() for text in expected[:-1]]
    assert found[-1] == expected[-1]


@pytest.mark.parametrize(
    ("text", "messages", "tools", "message"),
    [
        (FAMILIES["gemma 2 trims, names the model, alternates"], [BE, *CHAT], [], "refuses .* of system, .*must alt"),
        (FAMILIES["deepseek r1"], CHAT, [], "not render assistant message 3 as what follows its generation prompt"),
        (FAMILIES["qwen 3"], CALLED, [], "the chat template leaves out tool_calls"),
        (FAMILIES["qwen 3"], [user("a"), CALL], [], "the chat template leaves out tool_calls"),
        (template("{% if m.role != 'system' %}{{ m.content }}{% endif %}"), [BE, *CHAT], [], "out a turn of system"),
        (template(BODY), FUNCTIONS, [], "leaves out the functions of a turn of system"),
        (template(BODY), CHAT, TOOLS, r"leaves out the tools .*data\.ignore_columns"),
    ],
)
def test_conversations_for_which_a_template_has_no_place(text: str, messages: Any, tools: Any, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        ChatTemplate(byte_level(text)).render(messages, tools)


def test_a_call_that_has_no_place_is_left_to_the_base() -> None:
    template = ChatTemplate(byte_level(FAMILIES["qwen 3"]))
    assert template.render([user("a"), CALL], need_answer=False).answer is None


def test_functions_and_tools_go_to_the_template() -> None:
    chat = ChatTemplate(byte_level(template(BODY + "{{ m.functions or '' }}")))
    assert "f(x)" in chat.render(FUNCTIONS).prompt
    named = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    chat = ChatTemplate(byte_level(template(BODY, before=named)))
    assert chat.render(CHAT, TOOLS).prompt == "weather" + chat.render(CHAT).prompt

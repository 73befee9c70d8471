"""Tokenizers and chat templates of several families, and what tests do with them."""

from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from spec import corpus
from spec.corpus import ChatTemplate, Report, TokenSequence
from spec.corpus.tokens import tokenize
from tests.tiny import TURN, template

KIND = "{% if messages and messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
CHATML = template(TURN, before=KIND)
# The generation prompt opens a thought that no ready answer continues (DeepSeek R1's distillates).
FORCED_THINK = template(TURN, "<|im_start|>assistant\n<think>\n", KIND)
# The generation prompt ends in a space, which byte-level tokens carry at the front of the next word.
BOT = "{{ 'BOT: ' + m.content + '<|im_end|>\n' if m.role == 'assistant' else 'HUMAN: ' + m.content + '\n' }}"
SPACE = template(BOT, "BOT: ")
# No special token closes an answer (Alpaca).
UNCLOSED = template("{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}", "### assistant:\n")
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


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None) -> dict[str, str | None]:
    return {"role": "assistant", "content": content}


def encode(tokenizer: Any, messages: list[dict[str, Any]]) -> TokenSequence:
    ids, mask, prompt_length = tokenize(tokenizer, [ChatTemplate(tokenizer).render(messages)])[0]
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
    unset = dict.fromkeys(("prompt_key", "response_key", "max_samples"))
    options = {**unset, "max_length": 1024, "need_answers": False, **options}
    files = [files] if isinstance(files, Path) else files
    report = Report()
    sequences = corpus.stream(files, tokenizer or byte_level(), report=report, **options)
    return list(sequences), report

"""Every folder that is no base is refused with what is wrong; nothing but BaseError comes out."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, OpenAIGPTConfig

from spec.base import BaseError, examine, limits, load, resolve
from spec.config import Model
from tests.tiny import make_base

Change = Callable[[Path], None]


def configured(**values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def quantised(method: str, **values: Any) -> Change:
    return configured(quantization_config={"quant_method": method, **values})


def written(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text) and None


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def weights(change: Callable[[dict[str, Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def pickled(content: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return change


def sentencepiece(folder: Path) -> None:
    without("tokenizer.json")(folder)
    (folder / "tokenizer.model").write_bytes(b"no sentencepiece model")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')


def in_parts(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    parts = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def smaller_table(folder: Path) -> None:
    """Weights and config agree; the tokenizer has more tokens."""
    configured(vocab_size=280)(folder)
    weights(lambda all_: all_.update({"transformer.wte.weight": all_["transformer.wte.weight"][:280].clone()}))(folder)


def prefixed(all_: dict[str, Tensor]) -> None:
    for name in list(all_):
        all_[f"module.{name}"] = all_.pop(name)


LAYER = "transformer.h.1.mlp.c_fc.weight"
CASES: dict[str, tuple[Change, str]] = {
    "an architecture that is not known": (configured(model_type="new"), "transformers 5.* does not know .* 'new'"),
    "no architecture": (configured(model_type=None), "names no architecture"),
    "code of its own": (configured(model_type="new", auto_map={"AutoConfig": "own.C"}), "set model.trust_remote_code"),
    "no language model": (configured(model_type="t5"), "'t5' is no language model"),
    "no JSON": (written("config.json", "{"), "config.json cannot be read"),
    "no object": (written("config.json", "[]"), "config.json cannot be read"),
    "an impossible value": (configured(n_head=5), "must be divisible"),
    "a value of another type": (configured(n_embd="wide"), "n_embd.* expected int, got str"),
    "GPTQ": (quantised("gptq", bits=4, group_size=128), "pip install optimum gptqmodel"),
    "AWQ": (quantised("awq", bits=4, group_size=128), "pip install gptqmodel"),
    "bitsandbytes": (quantised("bitsandbytes", load_in_4bit=True), "pip install bitsandbytes"),
    "compressed-tensors": (quantised("compressed-tensors", config_groups={}), "pip install compressed-tensors"),
    "an unknown quantisation": (quantised("new"), r"does not know \(new\)"),
    "an unknown attention": (configured(_attn_implementation="new"), 'implementation="new"` is not supported'),
    "more than tensors": (pickled({"module": torch.nn.Linear(2, 2)}), "holds more than named tensors"),
    "a lost part": (in_parts, "1 of 2 files that model.safetensors.index.json names are missing.* model-2"),
    "an index of nothing": (lambda f: (in_parts(f), written("model.safetensors.index.json", "{}")(f)), "no index"),
    "a pointer": (written("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "half a file": (truncated, "damaged or incomplete"),
    "a missing matrix": (weights(lambda all_: all_.pop(LAYER)), rf"lack {LAYER} \(1 in all\)"),
    "a missing layer": (configured(n_layer=3), r"lack transformer.h.2.*\(12 in all\)"),
    "another width": (configured(n_embd=16), r"c_attn.bias is \[96\] in the weights, but config.json gives \[48\]"),
    "resized": (configured(vocab_size=288), r"wte.weight is \[304, 32\] in the weights, .* gives \[288, 32\]"),
    "a classifier": (configured(architectures=["GPT2ForSequenceClassification"]), "ForSequenceClassification is no"),
    "embeddings": (written("modules.json", "[]"), "modules.json .* embeddings"),
    "fewer layers": (configured(n_layer=1), r"have transformer.h.1.*, for which .* no place"),
    "a bias that is lost": (weights(lambda all_: all_.update({"lm_head.bias": torch.zeros(304)})), "have lm_head.bias"),
    "other names": (weights(prefixed), r"lack .*, and have module.transformer"),
    "whole numbers": (weights(lambda all_: all_.update({LAYER: all_[LAYER].to(torch.int8)})), "holds integers"),
    "no output matrix": (configured(tie_word_embeddings=False), "lack lm_head.weight .* tie_word_embeddings to true"),
    "no numbers": (weights(lambda all_: all_[LAYER].fill_(torch.nan)), "states .* are not finite"),
    "an adapter": (adapter, "adapter for some/base.*merge_and_unload"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "no tokenizer"),
    "no vocabulary": (without("tokenizer.json"), "no tokenizer could be loaded"),
    "a broken tokenizer": (written("tokenizer.json", "{}"), "no tokenizer could be loaded"),
    "a broken tokenizer.model": (sentencepiece, "tokenizer.model"),
    "more tokens than rows": (smaller_table, r"no row: 280 \(.*the table has 280 rows"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_base_is_refused(folder: Path, case: str) -> None:
    spoil, words = CASES[case]
    spoil(folder)
    with pytest.raises(BaseError, match=words) as refused:
        load(Model(), resolve(str(folder), None), "digest", torch.device("cpu"))
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("case", ["more tokens than rows", "no tokenizer", "another width", "half a file"])
def test_it_is_refused_without_the_weights(folder: Path, case: str) -> None:
    spoil, words = CASES[case]
    spoil(folder)
    with pytest.raises(BaseError, match=words):
        examine(folder, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (configured(quantization_config=None), []),
        (weights(lambda all_: all_.update({"v_head.weight": torch.zeros(1, 32)})), ["have v_head.weight .* not read"]),
        (written("adapter_config.json", "{}"), ["adapter .* is not read"]),
    ],
)
def test_what_lies_next_to_the_weights_is_said(folder: Path, change: Change, words: list[str]) -> None:
    change(folder)
    notes = examine(folder, 1).notes
    assert all(re.search(pattern, note) for pattern, note in zip(words, notes, strict=True))


def test_an_adapter_that_peft_would_add_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    written("adapter_config.json", "{}")(folder)
    with pytest.raises(BaseError, match=r"Move adapter_config.json away"):
        examine(folder, 1)


def test_special_tokens_beyond_the_table_are_refused_where_the_template_writes_them(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{i}|>" for i in range(20)]})
    tokenizer.save_pretrained(folder)
    examine(folder, 1)
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "assistant<|19|>"))
    with pytest.raises(BaseError, match=r"no row: 30\d \('<\|19\|>'\)"):
        examine(folder, 1)


def test_a_model_without_a_memory_is_refused(folder: Path) -> None:
    sizes = {"vocab_size": 304, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    AutoModelForCausalLM.from_config(OpenAIGPTConfig(**sizes)).save_pretrained(folder)
    with pytest.raises(BaseError, match="OpenAIGPTLMHeadModel has no cache"):
        examine(folder, 1)


def test_a_missing_sentencepiece_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    sentencepiece(folder)
    with pytest.raises(BaseError, match="pip install sentencepiece"):
        load(Model(), folder, "digest", torch.device("cpu"))


def test_a_matrix_of_many_experts_is_missed(tmp_path: Path) -> None:
    """Their names in the weights are not those in the model."""
    sizes = {"vocab_size": 304, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    folder = make_base(tmp_path / "moe")
    AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads)).save_pretrained(folder)
    examine(folder, 1)
    weights(lambda all_: all_.pop(next(name for name in all_ if "experts.1" in name)))(folder)
    with pytest.raises(BaseError, match=r"lack .*experts"):
        examine(folder, 1)


def test_an_attention_that_is_not_here_is_replaced(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    configured(_attn_implementation="flash_attention_2")(folder)
    assert load(Model(), folder, "digest", torch.device("cpu")).model.config._attn_implementation == "sdpa"
    assert ["flash_attention_2" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize(("family", "hard"), [("gpt2", True), ("qwen2", False)])
def test_limits_follow_from_the_config(tmp_path: Path, family: Any, hard: bool) -> None:
    found = limits(make_base(tmp_path, family))
    assert (found.positions, found.hard, found.vocab_size) == (512, hard, 304)

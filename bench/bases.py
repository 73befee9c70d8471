"""Families of bases, each as a tiny random model of its real config class in float32: what works with it.

python -m bench.bases [NAME ..]     # all of them, or some; writes docs/bases.csv where it is all of them
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers import logging as transformers_logging

from spec import acceptance, heads
from spec.base import Base, answer, auto_class, find_logits, hidden_states
from spec.config import Decode
from spec.decoding import LanguageModelWithSpeculator
from spec.heads import LAST, Packed

CSV = Path("docs/bases.csv")
VOCAB, NEW = 96, 24
TIE = 1e-4
"""Logits that are no further apart are a tie, which falls by the rounding of the last bit."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
_NO_POSITIONS = {"max_position_embeddings": None}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}

_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
_PLAIN = (
    "llama qwen2 qwen3 gemma phi phi3 gpt_neox stablelm starcoder2 olmo olmo2 smollm3 nemotron glm glm4 ernie4_5 "
    "apertus arcee biogpt bitnet ernie4_5_moe gemma4_text glm4_moe helium hunyuan_v1_dense jetmoe minimax_m2 "
    "ministral3 nanochat olmo3 phimoe seed_oss vaultgemma xglm deepseek_v4 olmo_hybrid zaya"
)
"""Families whose config classes need no more than SIZES."""

FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in _PLAIN.split()},
    "mistral": {"sliding_window": 16},
    "ministral": _SLIDING,
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": _EXPERTS,
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 16, "final_logit_softcapping": 5.0},
    "gemma3_text": {"query_pre_attn_scalar": 8, **_SLIDING},
    "gpt2": _OLD,
    "gpt_bigcode": _OLD,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 16},
    "gptj": {**_OLD, "rotary_dim": 4},
    "codegen": {**_OLD, "rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4, **_NO_POSITIONS},
    "falcon": {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "olmoe": _EXPERTS,
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, "sliding_window": 16},
    "granite": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0, "num_local_experts": 4},
    "exaone4": {"sliding_window": 16},
    "deepseek_v3": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16},
        **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        **{"num_key_value_heads": 4, "first_k_dense_replace": 1},
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "granitemoehybrid": {
        **_MAMBA,
        **{"layer_types": ["mamba", "attention"], "num_local_experts": 4, "shared_intermediate_size": 16},
        "logits_scaling": 3.0,
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "mamba": {"state_size": 8, **_NO_POSITIONS},
    "mamba2": {**_NO_POSITIONS, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "falcon_mamba": {"state_size": 8, **_NO_POSITIONS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    "zamba2": {
        **{"mamba_d_state": 8, "n_mamba_heads": 8, "layers_block_type": ["mamba", "hybrid"], "chunk_size": 16},
        "attention_head_dim": 16,
    },
    "nemotron_h": {
        **{"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8},
        **{"ssm_state_size": 8, "n_groups": 1, "chunk_size": 16},
    },
    "gemma3": {
        "text_config": {"query_pre_attn_scalar": 8, "sliding_window": 16},
        "vision_config": {**_VISION, "image_size": 28, "patch_size": 14},
    },
    "llama4": {
        "text_config": {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 16},
        "vision_config": {**_VISION, "vision_output_dim": 32, "projector_output_dim": 32, "image_size": 28},
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", **_VISION, "image_size": 28, "patch_size": 14},
    },
    "mistral3": {
        "text_config": {"model_type": "mistral"},
        "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 8, "image_size": 28, "patch_size": 14},
    },
    **{
        name: {
            "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
            "vision_config": {**_VISION, "depth": 1, "num_heads": 2, "embed_dim": 32, "out_hidden_size": 32},
        }
        for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    },
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4, "block_size": 16},
}


@dataclass(frozen=True)
class Result:
    """What works with a family: yes or NO, or nothing where it cannot draft."""

    family: str  # its model_type
    memory: str  # attention, or recurrent
    positions: str  # none, soft or hard
    logits: str  # what they are beyond lm_head times the state, or unknown
    answers: str  # whether base.answer writes what generate writes
    lossless: str  # whether decoding by head, n-gram and hybrid writes what plain decoding writes
    walk: str  # whether the exact walk over the answers has the steps of that loop


def make(family: str) -> Base:
    """A tiny random base."""
    transformers_logging.set_verbosity_error()
    values = dict(FAMILIES[family])
    if "text_config" in values:
        values["text_config"] = {**SIZES, **values["text_config"]}
    else:
        values = {name: value for name, value in {**SIZES, **values}.items() if value is not None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **values)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    return Base(model.eval().requires_grad_(False), tokenizer, "digest", torch.device("cpu"), torch.float32)


def prompts(count: int = 10, longest: int = 40) -> list[list[int]]:
    """Random prompts, of several lengths; every third has a length that another one has."""
    generator = np.random.default_rng(0)
    lengths = [int(generator.integers(2, longest)) for _ in range(count)]
    return [generator.integers(3, VOCAB, lengths[i // 3 * 3 if i % 3 == 2 else i]).tolist() for i in range(count)]


def check(family: str) -> Result:
    """Compare what this project does with a family with what transformers does."""
    base = make(family)
    asked = prompts()
    written = answer(base, asked, NEW)
    lossless, walk = _decoded(base, asked, written) if base.limits.takes_back else ("", "")
    if not base.limits.takes_back:
        plain = LanguageModelWithSpeculator(base)
        for prompt, tokens in zip(asked, written, strict=True):
            assert _agree(base, prompt, tokens, plain.generate(prompt, NEW, draft="none").tokens), family
    logits = find_logits(base, [np.asarray(prompt, np.int32) for prompt in asked])
    without = {"scale": 1.0, "softcap": None, "bias": False}
    kinds = [] if logits is None else [name for name, value in without.items() if getattr(logits, name) != value]
    positions = base.limits.positions
    return Result(
        family=family,
        memory="recurrent" if base.limits.recurrent else "attention",
        positions="none" if positions is None else "hard" if base.limits.hard else "soft",
        logits="unknown" if logits is None else " ".join(kinds) or "plain",
        answers=_yes(all(_agree(base, *each, _generate(base, each[0])) for each in zip(asked, written, strict=True))),
        lossless=lossless,
        walk=walk,
    )


def _generate(base: Base, prompt: Sequence[int]) -> list[int]:
    """The answer by transformers' own loop."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}
    out = base.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def _decoded(base: Base, asked: Sequence[list[int]], written: Sequence[list[int]]) -> tuple[str, str]:
    """Whether decoding with drafts writes the answers, and whether the exact walk has its steps."""
    known = {"method": "sum_rnn", "n_predict": 3, "base_model_name_or_path": "random", "base_digest": "digest"}
    sizes = {"hidden_size": base.hidden_size, "vocab_size": base.vocab_size}
    widths: Any = dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), (32,))
    speculator = heads.build(heads.SumRnnConfig.model_validate({**known, **sizes, **widths}))
    speculator.initialise(base.tables)
    decode = Decode(ngram_min=1)
    model = LanguageModelWithSpeculator(base, speculator, decode)
    same, steps = True, True
    for prompt, tokens in zip(asked, written, strict=True):
        ids = torch.tensor(prompt + tokens)
        with torch.inference_mode():
            states = hidden_states(base.model, ids[None])[0, len(prompt) - 1 : -1]
        packed = Packed.of(ids, torch.arange(len(ids)) >= len(prompt), [len(ids)], {LAST: states})
        run = partial(speculator.draft_along, packed, torch.arange(len(tokens)))
        for source, what in model.sources.items():
            made = model.generate(prompt, NEW, draft=source)
            on_paper = acceptance.draft_answer(acceptance.Answer(ids.numpy(), len(prompt), 0), what, run)
            same &= _agree(base, prompt, tokens, made.tokens)
            if made.tokens == tokens:
                steps &= made.accepted == acceptance.walk(on_paper.matches, on_paper.length).tolist()
    return _yes(same), _yes(steps)


def _agree(base: Base, prompt: list[int], one: list[int], other: list[int]) -> bool:
    """Whether two answers are the same, as far as the first place where two tokens are as likely as each other."""
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if place is None:
        return len(one) == len(other)
    with torch.inference_mode():
        logits = base.model(input_ids=torch.tensor([prompt + one[:place]]), use_cache=False).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    return bool(first - second < TIE)


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def main() -> None:
    """Print a line for each family that is named, or make the table of all of them."""
    named = sys.argv[1:]
    for family in named:
        print(*asdict(check(family)).values(), sep=", ", flush=True)
    if not named:
        results = [asdict(check(family)) for family in FAMILIES]
        with CSV.open("w", newline="") as file:
            table = csv.DictWriter(file, list(results[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(results)
        print(f"{len(FAMILIES)} families -> {CSV}")


if __name__ == "__main__":
    main()

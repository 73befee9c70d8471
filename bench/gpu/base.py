"""A random base of the shape of Llama 3.1 8B: the cache, answers, decoding."""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.cache import cached_and_bare
from bench.decode import where_time_goes
from bench.gpu.check import Check
from bench.gpu.figures import SOURCES
from bench.gpu.sizes import Sizes
from spec import base as base_model
from spec import costs, heads
from spec.base import Base
from spec.decoding import LanguageModelWithSpeculator
from spec.device import synchronize
from spec.heads import Speculator, SpeculatorConfig
from spec.store.features import FeatureRow
from spec.store.plan import item_key, plan


def run(check: Check) -> None:
    """Measure what the base is needed for."""
    sizes, device = check.sizes, check.device
    card = costs.measure(device, torch.bfloat16)
    check.figure("card: bf16, TFLOP/s; memory, TB/s", f"{card.flops / 1e12:.1f}; {card.bandwidth / 1e12:.2f}")
    model = random_base(sizes, device)
    cache(check, model, card)
    for name, rows in zip(("smaller", "larger"), sizes.answers, strict=True):
        check.figure(f"respond, {name} batch, tokens/s", f"{answer(model, sizes, rows):,.0f} at {rows}")
    lm = LanguageModelWithSpeculator(model, random_heads(sizes, sizes.vocabulary).to(device, torch.bfloat16))
    prompt = [(7 * place) % 31 for place in range(sizes.prompt)]  # repeats itself, so that lookup finds something
    decoding(check, lm, "8B shape", [prompt], sizes.written)


def random_base(sizes: Sizes, device: torch.device) -> Base:
    """A base whose answers have no end."""
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        intermediate_size=sizes.intermediate,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=8192,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=None)
    return Base(model, tokenizer, "", device, torch.bfloat16)


def random_heads(sizes: Sizes, outputs: int) -> Speculator:
    """A sum_rnn as wide as the base, over the whole vocabulary or the first `outputs` tokens of it."""
    drafted = outputs if outputs < sizes.vocabulary else None
    config = SpeculatorConfig(
        method="sum_rnn",
        hidden_size=sizes.hidden,
        vocab_size=sizes.vocabulary,
        n_predict=sizes.n_predict,
        inner_dim=(sizes.hidden,),
        emb_dim=(sizes.hidden,),
        proj_dim=(sizes.hidden,),
        draft_vocab_size=drafted,
        base_model_name_or_path="",
        base_digest="",
    )
    speculator = heads.build(config, None if drafted is None else torch.arange(drafted))
    heads.init_random(speculator)
    return speculator


def cache(check: Check, model: Base, card: costs.Machine) -> None:
    """The cache stage's work compared with the bare forward of the same batches."""
    sizes = check.sizes
    generator = np.random.default_rng(0)
    mask = np.zeros(sizes.length, np.uint8)
    mask[sizes.length // 2 :] = 1
    rows = []
    for _ in range(sizes.cached):
        ids = generator.integers(0, sizes.vocabulary, sizes.length, np.int32)
        rows.append(FeatureRow(item_key(ids, mask), ids, mask))
    groups = plan([row.key for row in rows], [sizes.length] * len(rows), (), base_model.bucket, 16384)
    cached, bare = cached_and_bare(model, rows, groups, check.work / "cache", sizes.rounds)
    rate = statistics.median(cached)
    ratio = statistics.median(a / b for a, b in zip(cached, bare, strict=True))
    check.figure("bare forward, tokens/s", f"{statistics.median(bare):,.0f}")
    check.figure("cache, tokens/s", f"{rate:,.0f}")
    check.figure("cache / bare forward", f"{ratio:.3f}")
    passed = costs.passed_params(model.model) - model.lm_head.numel()  # states are read before lm_head
    check.figure("cache, share of the card's bf16 rate", f"{2 * passed * rate / card.flops:.3f}")


def answer(model: Base, sizes: Sizes, rows: int) -> float:
    """Tokens/s of answers that are written together."""
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, sizes.vocabulary, (rows, sizes.prompt)).tolist()
    base_model.answer(model, prompts, 2)
    synchronize(model.device)
    began = time.perf_counter()
    written = base_model.answer(model, prompts, sizes.written)
    return sum(map(len, written)) / (time.perf_counter() - began)


def decoding(check: Check, lm: LanguageModelWithSpeculator, name: str, prompts: list[list[int]], tokens: int) -> None:
    """Where a decoding step's time goes, for each source of drafts."""
    for source in SOURCES:
        spent = where_time_goes(lm, prompts, tokens, source)  # type: ignore[arg-type]
        share = 1 - (spent["layers"] + spent["lm_head"]) / spent["a step"]
        check.figure(
            f"{name}, {source}: ms a step; share that is not the base", f"{1e3 * spent['a step']:.2f}; {share:.3f}"
        )

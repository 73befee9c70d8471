"""A random base of the shape of Llama 3.1 8B: the cache, answers, decoding."""

from __future__ import annotations

import statistics
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.cache import cached_and_bare
from bench.common import seconds
from bench.decode import where_time_goes
from bench.gpu.check import Check
from bench.gpu.sizes import N_PREDICT, Sizes
from spec import base as base_model
from spec import config as config_module
from spec import costs, heads
from spec.base import Base
from spec.decoding import LanguageModelWithSpeculator
from spec.drafting import Source
from spec.heads import Layer, OnBase, Speculator
from spec.store import features
from spec.store.features import FeatureRow
from spec.store.plan import item_key


def run(check: Check) -> None:
    """Measure what the base is needed for."""
    sizes, device = check.sizes, check.device
    card = costs.measure(device, torch.bfloat16)
    check.figure("card: bf16, TFLOP/s; memory, TB/s", f"{card.flops / 1e12:.1f}; {card.bandwidth / 1e12:.2f}")
    model = random_base(sizes, device)
    cache(check, model, card)
    for name, rows in zip(("smaller", "larger"), sizes.answers, strict=True):
        check.figure(f"respond, {name} batch, tokens/s", f"{answer(model, sizes, rows):,.0f} at {rows}")
    lm = LanguageModelWithSpeculator(model, random_heads(sizes, sizes.vocabulary, device).to(torch.bfloat16))
    prompt = [(7 * place) % 31 for place in range(sizes.prompt)]  # repeats itself, so that lookup finds something
    decoding(check, lm, "8B shape", [prompt], sizes.written)


def random_base(sizes: Sizes, device: torch.device) -> Base:
    """A random base without stop tokens."""
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


def speculator_section(sizes: Sizes, outputs: int, method: str) -> dict[str, Any]:
    """Parameters of heads as wide as the base, over the whole vocabulary or the first `outputs` tokens of it."""
    widths = dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), sizes.hidden)
    drafted = outputs if outputs < sizes.vocabulary else None
    return {"method": method, "n_predict": N_PREDICT, "draft_vocab_size": drafted, **widths}


@torch.no_grad()
def random_heads(sizes: Sizes, outputs: int, device: torch.device, method: str = "sum_rnn") -> Speculator:
    """Heads with these parameters. Their weights are drawn on the device: on a CPU that takes half a minute."""
    section = speculator_section(sizes, outputs, method)
    params = config_module.from_mapping({"model": {"speculator": section}}).model.speculator
    shape = {"hidden_size": sizes.hidden, "vocab_size": sizes.vocabulary, "layers": sizes.layers}
    base = OnBase.model_validate({**shape, "base_model_name_or_path": "", "base_digest": ""})
    layer = Layer(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.hidden // sizes.heads,
        intermediate_size=sizes.intermediate,
    )
    config = heads.on_base(params, base, layer)
    torch.manual_seed(0)
    with device:
        drafted = params.draft_vocab_size
        speculator = heads.build(config, None if drafted is None else torch.arange(drafted))
    for parameter in speculator.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, min(parameter.shape) ** -0.5)
        else:
            parameter.fill_(0.5)  # of norms
    for name in speculator.borrowed:
        speculator.get_parameter(name).requires_grad_(False)
    return speculator


def cache(check: Check, model: Base, card: costs.Machine) -> None:
    """The cache stage's work compared with the bare forward of the same batches."""
    sizes = check.sizes
    generator = np.random.default_rng(0)
    mask = np.zeros(sizes.length, np.uint8)
    mask[sizes.length // 2 :] = 1
    tokens = generator.integers(0, sizes.vocabulary, (sizes.cached, sizes.length), np.int32)
    rows = [FeatureRow(item_key(ids, mask), ids, mask) for ids in tokens]
    groups = features.plan(rows, [()], sizes.segment)
    cached, bare = cached_and_bare(model, rows, groups, check.work / "cache", sizes.rounds)
    rate = statistics.median(cached)
    ratio = statistics.median(a / b for a, b in zip(cached, bare, strict=True))
    check.figure("bare forward, tokens/s", f"{statistics.median(bare):,.0f}")
    check.figure("cache, tokens/s", f"{rate:,.0f}")
    check.figure("cache / bare forward", f"{ratio:.3f}", "at least 0.95")
    passed = costs.passed_params(model.model) - model.lm_head.numel()  # states are read before lm_head
    check.figure("cache, share of the card's bf16 rate", f"{2 * passed * rate / card.flops:.3f}", "at least 0.40")


def answer(model: Base, sizes: Sizes, rows: int) -> float:
    """Tokens/s of answers that are written together, without the pass over their prompts."""
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, sizes.vocabulary, (rows, sizes.prompt)).tolist()

    def took(tokens: int) -> float:
        return seconds(lambda: base_model.answer(model, prompts, tokens))  # ends with what the device has written

    took(2)
    few = took(2)  # the pass over the prompts is in both
    return rows * sizes.written / (took(2 + sizes.written) - few)


def decoding(
    check: Check,
    lm: LanguageModelWithSpeculator,
    name: str,
    prompts: list[list[int]],
    tokens: int,
    expected: str = "share at most 0.10",
) -> None:
    """Where a decoding step's time goes, for each source of drafts."""
    for source in get_args(Source):
        spent = where_time_goes(lm, prompts, tokens, source)
        share = 1 - (spent["layers"] + spent["lm_head"]) / spent["a step"]
        value = f"{1e3 * spent['unclocked']:.2f}; {share:.3f}"
        figure = f"{name}, {source}: ms a step; share that is not the base"
        check.figure(figure, value, expected if source != "none" else "")

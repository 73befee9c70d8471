"""The formulas of docs/scaling.md, by hand."""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from spec import costs
from spec.config import from_mapping
from spec.costs import Job, Machine
from spec.errors import SpecError

WEIGHTS = 3 * 128256 * 4096 + 3 * 4096**2
SIZES = {"base_params": 8e9, "hidden_size": 4096, "tokens": 1e9, "positions": 6e8, "answers": 6e8, "rows": 64}
JOB = Job(**SIZES, head_operations=WEIGHTS)
MACHINE = Machine(flops=400e12, bandwidth=3e12)


def test_an_embedding_counts_only_where_it_is_lm_head_too() -> None:
    for tied in (True, False):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1, tie_word_embeddings=tied))
        named = {name: p.numel() for name, p in model.named_parameters()}
        assert ("lm_head.weight" in named) != tied
        looked_up = 0 if tied else named["transformer.wte.weight"]
        assert costs.passed_params(model) == sum(named.values()) - looked_up


def test_seconds_of_each_stage() -> None:
    assert costs.prefill_seconds(JOB, MACHINE) == pytest.approx(2 * 8e9 * 1e9 / 400e12)
    assert costs.epoch_seconds(JOB, MACHINE) == pytest.approx(6 * WEIGHTS * 6e8 / 400e12)
    teacher = replace(JOB, teacher_operations=128256 * 4096)  # a third of what a head costs
    more = costs.epoch_seconds(teacher, MACHINE) - costs.epoch_seconds(JOB, MACHINE)
    assert more == pytest.approx(2 * 128256 * 4096 * 6e8 / 400e12)
    for seconds in (costs.prefill_seconds, costs.answer_seconds, costs.epoch_seconds):
        assert seconds(JOB, MACHINE) == pytest.approx(4 * seconds(JOB, replace(MACHINE, devices=4)))
    together = costs.prefill_seconds(JOB, MACHINE) + costs.epoch_seconds(JOB, MACHINE)
    assert costs.loop_epoch_seconds(JOB, MACHINE) == pytest.approx(together)


def test_a_step_of_few_answers_reads_the_weights_and_of_many_multiplies_them() -> None:
    few, many = replace(JOB, rows=8), replace(JOB, rows=4096)
    assert costs.answer_seconds(few, MACHINE) == pytest.approx(6e8 / 8 * 16e9 / 3e12)
    assert costs.answer_seconds(many, MACHINE) == pytest.approx(6e8 * 16e9 / 400e12)
    wide = replace(MACHINE, weight_bytes=4)
    assert costs.answer_seconds(few, wide) == pytest.approx(2 * costs.answer_seconds(few, MACHINE))
    assert costs.answer_seconds(many, wide) == costs.answer_seconds(many, MACHINE)


def test_what_the_store_takes() -> None:
    assert costs.stored_bytes(JOB, "bfloat16", "none", "zstd") == pytest.approx(6e8 * 2 * 4096 + 5e9)
    assert costs.stored_bytes(JOB, "float32", "none", "zstd") == pytest.approx(6e8 * 4 * 4096 + 5e9)
    eagle = from_mapping({"model": {"speculator": {"method": "eagle3"}}})
    job = costs.make_job(eagle, 1e8, 576, 49152, 1000, 600, 0)
    assert job.layer_vectors == 3 * 1000
    deep = from_mapping({"model": {"speculator": {"method": "eagle3", "aux_layers": [2, 39]}}})
    assert costs.make_job(deep, 1e8, 576, 49152, 1000, 600, 0, layers=42).layer_vectors == 2 * 1000
    with pytest.raises(SpecError, match="the base has the layers 0 to 31"):
        costs.make_job(deep, 1e8, 576, 49152, 1000, 600, 0)
    exact = costs.stored_bytes(job, "bfloat16", "none", "none")
    assert exact == 600 * 2 * 576 + 3 * 1000 * 2 * 576 + 5 * 1000
    assert costs.stored_bytes(job, "bfloat16", "none", "fp8") < exact


def test_rates_of_this_machine() -> None:
    found = costs.measure(torch.device("cpu"), torch.float32, seconds=0.02)
    assert found.flops > 1e8
    assert found.bandwidth > 1e8
    assert found.weight_bytes == 4

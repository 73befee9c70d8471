"""The frozen base beside transformers' own generate and forward, and every folder that is no base."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from spec import base as base_model
from spec.base import Base, BaseError, answer, bucket, hidden_states, identify, load, prompt_bucket, resolve
from spec.config import Model
from tests.tiny import CHATML, HIDDEN_SIZE, VOCAB_SIZE, make_base, with_instructions

CPU = torch.device("cpu")
NEW = 24


@pytest.fixture(scope="module")
def bases(base: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """Positions that are learned, and positions that are rotations."""
    folder = make_base(tmp_path_factory.mktemp("bases") / "qwen2", "qwen2")
    return {"gpt2": base, "qwen2": load(Model(), folder, "digest", CPU, dtype="float32")}


@pytest.fixture(scope="module")
def halves(bases: dict[str, Base]) -> dict[str, Base]:
    """The same in bfloat16."""
    halved = {name: copy.deepcopy(base.model).to(torch.bfloat16) for name, base in bases.items()}
    return {name: replace(bases[name], model=model, dtype=torch.bfloat16) for name, model in halved.items()}


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base to be spoilt."""
    return shutil.copytree(base_folder, tmp_path / "model")


def prompts(count: int, longest: int = 90, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 290, generator.integers(1, longest)).tolist() for _ in range(count)]


def generate(base: Base, prompt: list[int], count: int) -> list[int]:
    """The answer by transformers' own loop."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = base.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, pad_token_id=0)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_answers_are_those_of_generate(bases: dict[str, Base], family: str) -> None:
    base = bases[family]
    asked = prompts(12)
    answers = answer(base, asked, NEW)
    assert answers == [generate(base, prompt, NEW) for prompt in asked]
    assert len({len(tokens) for tokens in answers}) > 2  # some end early, or this proves little


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_answers_do_not_depend_on_their_company(bases: dict[str, Base], family: str) -> None:
    base = bases[family]
    asked = prompts(8, longest=64)
    together = answer(base, asked, NEW)
    assert [answer(base, [prompt], NEW)[0] for prompt in asked] == together
    assert answer(base, asked[::-1], NEW) == together[::-1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_in_bfloat16_no_answer_depends_on_its_company_either(
    halves: dict[str, Base], family: str, temperature: float
) -> None:
    """Where other code for another number of rows rounds otherwise."""
    base = halves[family]
    asked, seeds = prompts(20, longest=64), list(range(20))

    def answers(rows: Sequence[int]) -> list[list[int]]:
        return answer(base, [asked[row] for row in rows], NEW, temperature, [seeds[row] for row in rows])

    together = answers(range(20))
    assert [answers([row])[0] for row in range(20)] == together
    assert answers(range(20)[::-1]) == together[::-1]
    assert [*answers(range(9)), *answers(range(9, 20))] == together
    assert len(set(map(len, together))) > 2


def test_an_answer_ends_with_its_first_stop_token_or_at_the_limit(base: Base) -> None:
    answers = answer(base, prompts(12), NEW)
    assert any(tokens[-1] in base.stop_ids for tokens in answers)
    for tokens in answers:
        assert not base.stop_ids & set(tokens[:-1])
        assert len(tokens) == NEW or tokens[-1] in base.stop_ids


@contextlib.contextmanager
def batches_of(base: Base) -> Iterator[list[int]]:
    """The number of rows of every forward pass of the block."""
    batches: list[int] = []
    hook = base.model.register_forward_pre_hook(
        lambda model, args, kwargs: batches.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        yield batches
    finally:
        hook.remove()


def test_finished_rows_leave_the_batch(base: Base) -> None:
    asked = prompts(24)
    writing: list[int] = []
    with batches_of(base) as batches:
        answers = answer(base, asked, NEW, on_token=writing.append)
    assert writing == [sum(len(tokens) > step for tokens in answers) for step in range(len(writing))]
    assert writing[-1] < writing[0] == len(asked)
    assert sum(writing) == sum(map(len, answers))
    for rows, batch in zip(writing, batches, strict=True):
        assert rows <= batch
        assert base_model.COMPACT * batch < rows or rows < base_model.LEAST_ROWS
    assert base_model.LEAST_ROWS <= batches[-1] < batches[0]


def test_a_batch_has_so_many_rows_that_its_size_rounds_nothing_otherwise(base: Base) -> None:
    writing: list[int] = []
    with batches_of(base) as batches:
        answers = answer(base, prompts(3), NEW, on_token=writing.append)
    assert len(answers) == 3
    assert set(batches) == {base_model.LEAST_ROWS}
    assert sum(writing) == sum(map(len, answers))  # idle rows count for nothing


def test_the_loop_ends_when_every_row_has(base: Base) -> None:
    asked = [p for p, tokens in zip(prompts(12), answer(base, prompts(12), NEW), strict=True) if len(tokens) < NEW]
    steps: list[int] = []
    answers = answer(base, asked, 200, on_token=steps.append)
    assert len(steps) == max(map(len, answers)) < NEW


def test_sampling_follows_the_seeds(base: Base) -> None:
    asked, seeds = prompts(4), [1, 2, 3, 4]
    drawn = answer(base, asked, NEW, temperature=1.0, seeds=seeds)
    assert answer(base, asked, NEW, temperature=1.0, seeds=seeds) == drawn
    other = answer(base, asked, NEW, temperature=1.0, seeds=[1, 2, 3, 5])
    assert other[:3] == drawn[:3]
    assert other[3] != drawn[3]
    assert drawn != answer(base, asked, NEW)
    assert answer(base, asked, NEW, temperature=1e-4, seeds=seeds) == answer(base, asked, NEW)


def test_prompts_that_are_equal_are_sampled_apart(base: Base) -> None:
    (prompt,) = prompts(1)
    drawn = answer(base, [prompt] * 6, NEW, temperature=1.0, seeds=range(6))
    assert len(set(map(tuple, drawn))) > 3


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_samples_have_the_softmaxs_frequencies(base: Base, temperature: float) -> None:
    (prompt,) = prompts(1, longest=8)
    count = 500
    drawn = Counter(tokens[0] for tokens in answer(base, [prompt] * count, 1, temperature, range(3, 3 + count)))
    logits = base.model(torch.tensor([prompt])).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    assert expected.max() < 0.95
    for token in expected.topk(5).indices.tolist():
        p = float(expected[token])
        assert abs(drawn[token] / count - p) < 4.5 * (p * (1 - p) / count) ** 0.5


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_lm_head_reads_the_hidden_states(bases: dict[str, Base], family: str) -> None:
    base = bases[family]
    ids = torch.tensor(prompts(1, longest=90)).reshape(1, -1)
    with torch.no_grad():
        states = hidden_states(base.model, ids)
        padded = hidden_states(base.model, torch.nn.functional.pad(ids, (0, 7), value=5))
        torch.testing.assert_close(states @ base.lm_head.T, base.model(ids).logits)
    assert states.shape == (*ids.shape, HIDDEN_SIZE)
    torch.testing.assert_close(padded[:, : ids.shape[1]], states)  # padding on the right changes nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda out: 50 * (out / 50).tanh(), id="a weak cap"),
        pytest.param(lambda out: 1.02 * out, id="a scale"),
        pytest.param(lambda out: out + 0.2 * torch.linspace(-1, 1, out.shape[-1]).to(out), id="a bias"),
    ],
)
def test_logits_that_are_more_than_lm_head_times_the_state_are_told(
    bases: dict[str, Base], change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    rows = [np.random.default_rng(seed).integers(3, 290, 40).astype(np.int32) for seed in range(4)]
    for base in bases.values():
        plain = replace(base, model=copy.deepcopy(base.model).to(dtype))
        assert base_model.has_linear_logits(plain, rows)
        plain.model.get_output_embeddings().register_forward_hook(lambda module, args, out: change(out))
        assert not base_model.has_linear_logits(plain, rows)


def test_what_computed_something_is_told() -> None:
    assert base_model.producer(CPU, torch.float32) == {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": "cpu",
        "arithmetic": "float32",
    }


def test_shapes_are_those_of_lm_head_not_of_the_tokenizer(base: Base) -> None:
    assert (base.vocab_size, base.hidden_size) == (VOCAB_SIZE, HIDDEN_SIZE)
    assert len(base.tokenizer) < base.vocab_size
    assert base.lm_head.shape == base.embedding.shape == (VOCAB_SIZE, HIDDEN_SIZE)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.parametrize(("model", "tokenizer", "stops"), [(5, 2, {2, 5}), ([5, 6], None, {5, 6}), (None, 2, {2})])
def test_stop_tokens_of_model_and_tokenizer(base: Base, model: Any, tokenizer: Any, stops: set[int]) -> None:
    class Stub:
        generation_config = type("G", (), {"eos_token_id": model})
        eos_token_id = tokenizer

    assert replace(base, model=Stub(), tokenizer=Stub()).stop_ids == stops


@given(st.integers(1, 5000))
def test_buckets(length: int) -> None:
    padded = bucket(length)
    assert padded % base_model.BUCKET == 0
    assert length <= padded < length + base_model.BUCKET
    padded = prompt_bucket(length)
    assert padded == base_model.BUCKET or (padded & (padded - 1) == 0 and padded < 2 * length)
    assert padded >= max(length, base_model.BUCKET)


def test_weights_are_the_same_whatever_they_are_computed_in(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_instructions(monkeypatch, "avx512_bf16")
    narrow = load(Model(), base_folder, "digest", CPU)
    assert not caplog.messages
    with_instructions(monkeypatch)
    wide = load(Model(), base_folder, "digest", CPU)
    assert (narrow.model.dtype, wide.model.dtype) == (torch.bfloat16, torch.float32)
    assert narrow.dtype == wide.dtype == torch.bfloat16
    for mine, theirs in zip(narrow.model.parameters(), wide.model.parameters(), strict=True):
        assert torch.equal(mine.float(), theirs)
    assert caplog.messages == ["this CPU has no instructions for bfloat16: the base computes in float32"]
    assert wide.producer == {**narrow.producer, "arithmetic": "float32"}


def test_dtype_is_the_parameters_unless_told_otherwise(base_folder: Path) -> None:
    loaded = load(Model(), base_folder, "digest", CPU)
    assert loaded.dtype == torch.bfloat16
    assert loaded.digest == "digest"
    assert load(Model(), base_folder, "digest", CPU, dtype="float32").model.dtype == torch.float32


def test_a_model_whose_lm_head_reads_something_else_is_refused(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = base_model.hidden_states
    monkeypatch.setattr(base_model, "hidden_states", lambda model, ids: real(model, ids) * 2)
    with pytest.raises(BaseError, match="lm_head does not read the model's last hidden state"):
        load(Model(), base_folder, "digest", CPU)


def test_resolve_takes_a_folder(base_folder: Path) -> None:
    assert resolve(str(base_folder), None) == base_folder
    assert base_model.downloaded_revision(base_folder, Model(partial_pretrain=str(base_folder))) is None


@pytest.mark.parametrize(
    ("missing", "words"), [("config.json", "no config.json"), ("model.safetensors", "no weights.*safetensors")]
)
def test_resolve_names_what_a_folder_lacks(folder: Path, missing: str, words: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(BaseError, match=words):
        resolve(str(folder), None)


@pytest.mark.parametrize("name", ["nowhere", "./owner/name", "/no/where", "a/b/c"])
def test_resolve_refuses_what_is_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(BaseError, match=r"no folder .*owner/name"):
        resolve(name, None)


def test_resolve_downloads_a_revision_and_refuses_one_without_weights(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = {"v1": base_folder, "v2": tmp_path}
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, *, revision, allow_patterns: hub[revision])
    assert resolve("owner/name", "v1") == base_folder
    with pytest.raises(BaseError, match="no weights"):
        resolve("owner/name", "v2")


def test_resolve_tells_of_a_hub_that_does_not_answer() -> None:
    with pytest.raises(BaseError, match=r"'owner/no-such-model' is no local folder and could not be downloaded"):
        resolve("owner/no-such-model", None)


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def no_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def too_narrow(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 16}))


def without_a_matrix(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights[next(name for name in weights if name.endswith("h.1.mlp.c_fc.weight"))]
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    "spoil",
    [
        no_tokenizer,
        no_vocabulary,
        truncated,
        too_narrow,
        without_a_matrix,
    ],
)
def test_a_folder_that_does_not_load_is_refused(folder: Path, spoil: Callable[[Path], None]) -> None:
    spoil(folder)
    with pytest.raises(BaseError, match=str(folder)):
        load(Model(), folder, "digest", CPU)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def replace_text(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("name", "change", "changed"),
    [
        ("model.safetensors", flip, {"weights"}),
        (
            "config.json",
            replace_text('"activation_function": "gelu_new"', '"activation_function": "gelu"'),
            {"weights"},
        ),
        ("tokenizer.json", replace_text("<|endoftext|>", "<|endoftexx|>"), {"tokenizer"}),
        ("chat_template.jinja", replace_text(CHATML[:20], CHATML[:20] + " "), {"tokenizer"}),
        ("README.md", lambda path: path.write_text("a model"), set()),
        ("generation_config.json", replace_text('"eos_token_id": 2', '"eos_token_id": 5'), {"generation"}),
    ],
)
def test_identity_follows_what_states_and_answers_depend_on(
    folder: Path, name: str, change: Callable[[Path], None], changed: set[str]
) -> None:
    before = identify(folder)
    assert identify(folder) == before
    change(folder / name)
    after = identify(folder)
    assert {key for key in before if before[key] != after[key]} == changed


def test_identity_does_not_depend_on_where_the_folder_is(folder: Path, base_folder: Path) -> None:
    assert identify(folder) == identify(base_folder)


def test_safetensors_go_before_bin(folder: Path) -> None:
    before = identify(folder)
    (folder / "pytorch_model.bin").write_bytes(b"another format")
    assert identify(folder) == before
    (folder / "model.safetensors").unlink()
    assert identify(folder)["weights"] != before["weights"]
    assert resolve(str(folder), None) == folder


@pytest.mark.parametrize(
    "name",
    ["tekken.json", "cl100k.tiktoken", "sentencepiece.bpe.model", "tokenizer.model", "chat_templates/tools.jinja"],
)
def test_every_file_that_a_tokenizer_reads_is_part_of_its_digest(base_folder: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "base")
    before = identify(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("one")
    one = identify(folder)
    (folder / name).write_text("another")
    assert len({before["tokenizer"], one["tokenizer"], identify(folder)["tokenizer"]}) == 3
    assert identify(folder)["weights"] == before["weights"]

"""Joint training from fetch to evaluate: a base that others can load, measured with its own states."""

import csv
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spec import base as base_model
from spec import corpus, files, heads
from spec.config import Model
from spec.decoding import LanguageModelWithSpeculator
from spec.store import index
from spec.store.manifest import Manifest
from stages import common
from tests.stages.workspace import content, copy_of, inline_workers, ok, prepare, refused, run_through

JOINT = {
    "model": {"freeze_base_model": False, "speculator_loss_coeff": 0.5},
    "optim": {"lr": 0.01, "base_lr": 0.001},
    "trainer": {"total_epochs": 4, "test_freq": 8, "launcher": sys.executable},
}
TRAINED = Path("models/trained_base")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which everything up to cache has run."""
    root = prepare(tmp_path_factory.mktemp("joint"), JOINT)
    before = content(root / "base")
    run_through(root, "cache")
    yield root
    assert content(root / "base") == before


@pytest.fixture(scope="module")
def trained(cached: Path) -> Path:
    """That folder after training, in a process of the launcher's, and evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cached)
        said = ok("train")
        assert "jointly with the base x 4 epochs" in said
        ok("evaluate")
    return cached


@pytest.fixture
def folder(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(copy_of(cached, tmp_path))
    inline_workers(monkeypatch)
    return tmp_path


def test_answers_are_the_datas_whoever_writes_them_elsewhere(cached: Path) -> None:
    for split in common.SPLITS:
        path = cached / common.responses_path(split)
        assert corpus.read_origin(path)["source"] == "data"
        for one, other in zip(corpus.read(path), corpus.read(cached / common.tokens_path(split)), strict=True):
            assert np.array_equal([one.ids, one.mask], [other.ids, other.mask])
            assert one.mask.any()


def test_nothing_is_cached_for_training(cached: Path) -> None:
    for split in common.SPLITS:
        manifest = Manifest.load(cached / common.features_path(split))
        assert (len(manifest), manifest.positions, manifest.hidden_size, manifest.vocab_size) == (0, 0, 32, 304)
        assert manifest.content == files.digest_file(cached / common.responses_path(split))
    assert files.read_json(cached / "results/cache/details.json") == {}


def test_the_base_has_learned_the_datas_own_answers(trained: Path) -> None:
    with (trained / "results/train/train.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    for name in ("base_loss", "speculator_loss"):
        assert rows[-1][name] < rows[0][name]
    metrics = files.read_json(trained / "results/train/details.json")
    before, model = (AutoModelForCausalLM.from_pretrained(trained / name, dtype="auto") for name in ("base", TRAINED))
    losses = []
    for each in (before, model):
        found = []
        for row in corpus.read(trained / common.responses_path("val")):
            ids, kept = torch.from_numpy(row.ids).long(), torch.from_numpy(row.mask[1:] != 0)
            with torch.no_grad():
                logits = each(input_ids=ids[None]).logits[0, :-1]
            found.append(torch.nn.functional.cross_entropy(logits[kept], ids[1:][kept], reduction="none"))
        losses.append(torch.cat(found).mean().item())
    assert losses[1] < 0.8 * losses[0]
    assert losses[1] == pytest.approx(metrics["val"]["base_loss"], rel=1e-4)
    assert model.dtype == torch.float32
    assert not any(torch.equal(one, other) for one, other in zip(model.parameters(), before.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(trained / TRAINED)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(trained / "base").chat_template
    assert model.generation_config.eos_token_id == before.generation_config.eos_token_id


def test_heads_and_trained_base_belong_together(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    config = heads.read_config("models/speculator")
    assert config.base_model_name_or_path == str(TRAINED)
    assert config.base_digest == base_model.identify(TRAINED)["weights"]
    assert config.base_digest != common.read_sources()["base"]["weights"]
    base = base_model.load(Model(dtype="float32"), TRAINED, config.base_digest, torch.device("cpu"))
    model = LanguageModelWithSpeculator(base, heads.load("models/speculator"))
    prompt = base.tokenizer("What is 2 plus 3?")["input_ids"]
    assert model.generate(prompt, 12, draft="head").tokens == model.generate(prompt, 12, draft="none").tokens


def test_it_is_evaluated_with_its_own_states_which_their_source_rows_find(trained: Path) -> None:
    metrics = files.read_json(trained / "results/evaluate/details.json")
    rows = corpus.read(trained / common.responses_path("eval"))
    assert metrics["offline"]["answers"] == len(rows)
    assert metrics["offline"]["written_by_base"] == 0
    assert metrics["offline"]["tokens_per_step"] >= 1
    assert metrics["decode"]["lossless"] is True
    assert metrics["decode"]["prompts"] == 2
    sources = {row.source for row in rows}
    assert index.find(trained / "store", sources).keys() == sources


def test_evaluation_is_of_this_very_base(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_of(trained, tmp_path)
    shutil.copytree(trained / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(TRAINED)
    shutil.copytree(trained / "base", TRAINED)
    assert "base_digest: the speculator was trained on models/trained_base" in refused("evaluate")


def test_dropout_follows_from_the_seed_alone(trained: Path, folder: Path) -> None:
    torch.manual_seed(7)
    ok("train")
    found = content(Path("models"))
    shutil.rmtree("models")
    torch.manual_seed(8)
    ok("train")
    assert content(Path("models")) == found
    # The command did its arithmetic in another process, on all cores.
    expected = heads.load(trained / "models/speculator").state_dict()
    for name, weight in heads.load("models/speculator").state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-2)


def test_the_trained_base_has_the_dtype_of_the_run(folder: Path) -> None:
    overrides = ("model.dtype=bfloat16", "trainer.total_epochs=1")
    ok("cache", *overrides)
    ok("train", *overrides)
    ok("evaluate", *overrides)
    assert AutoModelForCausalLM.from_pretrained(TRAINED, dtype="auto").dtype == torch.bfloat16


def test_other_heads_train_where_there_is_space(cached: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = AutoModelForCausalLM.from_pretrained(cached / "base").num_parameters()
    with monkeypatch.context() as patch:
        patch.setattr(files, "free_bytes", lambda path: 32 * parameters)
        assert "train needs up to" in refused("train")
    chosen = (f"model.speculator.{override}" for override in ("method=sum_lstm", "init=base", "draft_vocab_size=60"))
    ok("train", "trainer.total_epochs=1", *chosen)
    ok("evaluate")
    assert heads.read_config("models/speculator").method == "sum_lstm"


@pytest.mark.slow
def test_several_workers_train_it_under_torchrun(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy_of(cached, tmp_path))
    ok("train", "trainer.launcher=torchrun --standalone --nproc-per-node=2", "trainer.total_epochs=2")
    ok("evaluate")
    metrics = files.read_json(Path("results/train/details.json"))
    assert metrics["steps"] == 12
    assert files.read_json(Path("results/evaluate/details.json"))["decode"]["lossless"] is True


def test_other_sequences_than_those_that_cache_saw(folder: Path) -> None:
    ok("train", "trainer.total_epochs=1")
    for stage, split in (("train", "val"), ("evaluate", "eval")):
        path = common.responses_path(split)
        corpus.write(path, corpus.read(path)[1:], corpus.read_origin(path))
        assert f"{path} is missing or not the file that data/features/{split}.json was made from" in refused(stage)
        path.unlink()
        assert f"{path} is missing or not the file" in refused(stage)


def test_a_base_whose_logits_are_more_than_lm_head_times_state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "has_linear_logits", lambda base, rows: False)
    assert "set model.freeze_base_model to true" in refused("train")

"""Bad input stops a stage before any work, with a message that says what to do; nothing on disk is harmed."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from spec import config as config_module
from spec import heads
from spec.store import features
from spec.store.manifest import Manifest
from stages import cli, common
from tests.tiny import make_base, write_prompts


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which fetch has run."""
    root = tmp_path_factory.mktemp("ready")
    make_base(root / "base")
    write_prompts(root / "prompts")
    values = {f"{split}_files": str(root / f"prompts/{split}.parquet") for split in common.SPLITS}
    config = config_module.from_mapping(
        {"data": values, "model": {"partial_pretrain": str(root / "base")}, "trainer": {"logger": "console"}}
    )
    config_module.save(config, root / "params.yaml")
    return root


@pytest.fixture
def folder(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(ready / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stage(name: str, *overrides: str) -> str:
    """Run a stage that must fail; its message."""
    result = CliRunner().invoke(cli.main, [name, *(part for override in overrides for part in ("-S", override))])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


def ok(name: str, *overrides: str) -> None:
    result = CliRunner().invoke(cli.main, [name, *(part for override in overrides for part in ("-S", override))])
    assert result.exit_code == 0, result.output


def write(path: Path, **columns: list) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.speculator.n_predict=0", "n_predict"),
        ("model.speculator.emb_dim=64", "emb_dim ends in 64 and proj_dim in 1024"),
        ("model.speculator.metod=sum_rnn", "did you mean method"),
        ("optim.lr=fast", "optim.lr"),
        ("trainer.logger=wandb", "wandb"),
        ("nonsense", "key=value"),
    ],
)
def test_parameters(folder: Path, override: str, message: str) -> None:
    assert message in stage("fetch", override)
    assert not (folder / "data").exists()


def test_lstm_needs_tied_weights(folder: Path) -> None:
    assert "tie_weights" in stage("fetch", "model.speculator.method=sum_lstm", "model.speculator.tie_weights=false")


def test_no_params_file(folder: Path) -> None:
    (folder / "params.yaml").unlink()
    assert "no such parameter file" in stage("fetch")


def test_missing_data_file(folder: Path) -> None:
    assert "absent.parquet" in stage("fetch", "data.train_files=absent.parquet")


def test_base_without_weights(folder: Path, ready: Path) -> None:
    shutil.copytree(ready / "base", folder / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "no weights" in stage("fetch", "model.partial_pretrain=empty")


def test_unknown_base(folder: Path) -> None:
    assert "no folder" in stage("fetch", "model.partial_pretrain=./nowhere")


@pytest.mark.parametrize(
    ("columns", "overrides", "message"),
    [
        ({"question": []}, (), "no rows"),
        ({"colour": ["red"]}, (), "colour"),
        ({"question": ["a", None]}, (), "null"),
        ({"question": ["a"], "answer": [""]}, ("respond.source=data",), "answer"),
        ({"question": ["a"]}, ("respond.source=data",), "answer"),
        ({"question": ["a"]}, ("data.prompt_key=prompt.text",), "prompt"),
        ({"question": ["word " * 500]}, ("data.max_length=32",), "max_length"),
    ],
)
def test_training_file(folder: Path, columns: dict, overrides: tuple[str, ...], message: str) -> None:
    types = {"question": pa.string()} if columns == {"question": []} else {}
    path = folder / "bad.parquet"
    pq.write_table(pa.table({k: pa.array(v, types.get(k)) for k, v in columns.items()}), path)
    named = f"data.train_files={path}"
    ok("fetch", named)
    assert message in stage("tokenize", named, *overrides)
    assert not (folder / "data/tokens/train.parquet").exists()


def test_not_a_parquet_file(folder: Path) -> None:
    (folder / "text.parquet").write_text("question,answer\n")
    ok("fetch", "data.train_files=text.parquet")
    assert "parquet" in stage("tokenize", "data.train_files=text.parquet")


def test_no_space(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok("fetch")
    ok("tokenize")
    monkeypatch.setattr("spec.files.free_bytes", lambda path: 10)
    message = stage("respond")
    assert "free" in message
    assert "features.store" in message
    assert not (folder / "data/responses").exists()


def test_checkpoint_of_another_base(folder: Path, ready: Path) -> None:
    """Evaluating a head on a base with another vocabulary names both numbers."""
    config = heads.SpeculatorConfig(
        method="sum_rnn", hidden_size=8, vocab_size=17, n_predict=2, inner_dim=(8,), emb_dim=(8,), proj_dim=(8,),
        base_model_name_or_path="other", base_digest="other",
    )  # fmt: skip
    speculator = heads.build(config)
    heads.init_random(speculator)
    heads.save(speculator, folder / "models/speculator")
    base = {"name": "b", "revision": None, "weights": "x", "tokenizer": "t", "generation": "g"}
    identity = features.identity(base, "bfloat16", "zstd")
    Manifest(identity, base, 8, 23, [], [], [], [], "", [], [], [], [], 0, 0).save(folder / "data/features/eval.json")
    (folder / "data/sources.json").write_text(json.dumps({"base": base}))
    message = stage("evaluate")
    assert "17" in message
    assert "23" in message

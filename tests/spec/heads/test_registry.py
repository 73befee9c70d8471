"""Methods by name, one of them brought by another package."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spec import heads
from spec.config import ConfigError, flatten, from_mapping
from spec.export import ExportError, write
from spec.heads import CheckpointError, Speculator

TOY = Path(__file__).parents[2] / "toy"
ON_BASE = {"hidden_size": 4, "vocab_size": 6, "base_model_name_or_path": "some/base", "base_digest": "d1"}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with two methods, of which one cannot be loaded."""
    info = tmp_path / "toy_head-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-head\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[spec.heads]\ntoy = toy_head:ToyHead\nbroken = toy_head:Absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(TOY)
    monkeypatch.delitem(sys.modules, "toy_head", raising=False)


def toy() -> Speculator:
    return heads.build(heads.parse_config({"method": "toy", "n_predict": 2, "decay": 0.3, **ON_BASE}))


def test_a_package_brings_a_method_which_is_loaded_when_it_is_named(package: None) -> None:
    with pytest.raises(ValueError, match="'nothing' is not known; there are sum_rnn, sum_lstm, eagle3, broken, toy"):
        heads.method("nothing")
    heads.method("sum_lstm")
    assert "toy_head" not in sys.modules
    with pytest.raises(ValueError, match=r"method broken: toy_head:Absent cannot be loaded .*Absent"):
        heads.method("broken")
    assert heads.method("toy").__name__ == "ToyHead"


def test_its_parameters_are_checked_as_those_of_all_others(package: None, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"method": "toy", "decay": 0.3, "n_predict": 2, "inner_dim": 576, "tie_lstm_embs": False}
    config = from_mapping({"model": {"speculator": section}})
    shown = {key: value for key, value in flatten(config).items() if key.startswith("model.speculator.")}
    expected = {"method": "toy", "n_predict": 2, "init": "random", "draft_vocab_size": None, "decay": 0.3}
    assert shown == {f"model.speculator.{key}": value for key, value in expected.items()}
    with pytest.raises(ConfigError, match=r"model\.speculator\.decy: unknown key; did you mean decay\?"):
        from_mapping({"model": {"speculator": {"method": "toy", "decy": 0.3}}})
    with pytest.raises(ConfigError, match=r"model\.speculator.decay: .* valid number, found 'x'"):
        from_mapping({"model": {"speculator": {"method": "toy", "decay": "x"}}})
    too_long = {"model": {"speculator": section}, "decode": {"draft": "head", "draft_len": 3}}
    with pytest.raises(ConfigError, match=r"draft_len is 3, and the heads of model.speculator draft at most 2 tokens"):
        from_mapping(too_long)
    monkeypatch.setattr(heads.method("toy").Params, "longest_draft", None)
    from_mapping(too_long)


def test_what_it_borrows_is_not_kept(package: None, tmp_path: Path) -> None:
    tables = {"embedding": torch.rand(6, 4), "lm_head": torch.rand(6, 4)}
    made = toy()
    made.initialise(None, 5)
    made.lend(tables)
    heads.save(made, tmp_path)
    kept = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert kept.keys() == made.state_dict().keys() - {"embedding.weight"}
    back = heads.load(tmp_path, tables=tables)
    assert all(torch.equal(weight, back.state_dict()[name]) for name, weight in made.state_dict().items())
    assert {name for name, p in back.named_parameters() if not p.requires_grad} == {"embedding.weight"}
    with pytest.raises(CheckpointError, match="toy reads the base's embedding: give the base's tables"):
        heads.load(tmp_path)
    with pytest.raises(ExportError, match="arctic holds sum_rnn and sum_lstm, and this speculator's method is toy"):
        write(tmp_path, tmp_path / "e", torch.float32)


def test_a_config_with_keys_that_its_method_had_in_an_earlier_version() -> None:
    widths = {"inner_dim": 8, "emb_dim": 8, "proj_dim": "6.8"}
    c = heads.parse_config({"method": "sum_rnn", "n_predict": 3, **widths, **ON_BASE})
    assert heads.parse_config({**c.to_json(), "tie_lstm_embs": True}) == c


def test_heads_need_torch_and_pydantic_alone() -> None:
    code = "import sys, spec.heads; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    own = {name for name in loaded if name.startswith("spec.") and not name.startswith("spec.heads")}
    assert own == {"spec.errors", "spec.files", "spec.section"}
    others = "transformers zarr numcodecs pyarrow pandas ruamel.yaml click mlflow dvc"
    assert set(others.split()).isdisjoint(loaded)

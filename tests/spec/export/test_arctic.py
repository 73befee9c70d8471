from pathlib import Path

import pytest
import torch

from spec import files
from spec.export import ExportError, read, write
from spec.heads import CheckpointError
from tests.spec.export import engines
from tests.spec.heads.reference import config, inputs


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("method", "tied"), [("sum_rnn", True), ("sum_rnn", False), ("sum_lstm", True)])
def test_arctic_inference_drafts_the_same(tmp_path: Path, n: int, scaled: bool, method: str, tied: bool) -> None:
    c = config(method, n_predict=n, scale_input=scaled, tie_weights=tied, tie_lstm_embs=method == "sum_lstm")
    speculator = engines.checkpoint(tmp_path / "c", c)
    write(tmp_path / "c", tmp_path / "e", torch.float32)
    states, tokens = inputs(c, positions=40)
    expected = speculator.draft(states, tokens[:, 0])
    assert torch.equal(engines.arctic(tmp_path / "e")(states, tokens[:, 0]), expected)
    back = read(str(tmp_path / "e"))
    assert back.config == c
    assert all(torch.equal(weight, back.state_dict()[name]) for name, weight in speculator.state_dict().items())


def test_the_base_is_named_for_the_engines_check(tmp_path: Path) -> None:
    """Without its architecture the engine refuses the head, unless it is told not to look."""
    engines.checkpoint(tmp_path / "c", config())
    written = write(tmp_path / "c", tmp_path / "e", torch.float32, base_architectures=["LlamaForCausalLM"])
    assert engines.config_of(tmp_path / "e")["base_model_archs"] == ["LlamaForCausalLM"]
    assert written.command.startswith("ARCTIC_INFERENCE_ENABLED=1 vllm serve some/base \\\n")
    written = write(tmp_path / "c", tmp_path / "e", torch.float32)
    assert "base_model_archs" not in engines.config_of(tmp_path / "e")
    assert "ARCTIC_INFERENCE_SKIP_SPEC_MODEL_CHECK=1 vllm serve" in written.command


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"emb_dim": (6, 8)}, r"no stack of widths \(found inner_dim 8, emb_dim 6\.8, proj_dim 8\).*One integer"),
        ({"inner_dim": (10,)}, r"one width .*inner_dim 10, emb_dim 8, proj_dim 8.*Train with the three widths equal"),
        ({"draft_vocab_size": 9}, r"no draft vocabulary.*9 rows.*draft_vocab_size=null"),
        ({"method": "sum_lstm"}, r"gates share one embedding\. Train with model\.speculator\.tie_lstm_embs=true"),
    ],
)
def test_what_it_cannot_hold(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    engines.checkpoint(tmp_path / "c", config(**changes))
    with pytest.raises(ExportError, match=words):
        write(tmp_path / "c", tmp_path / "e", torch.float32)
    assert not (tmp_path / "e").exists()


def changed(folder: Path, **values: object) -> str:
    engines.checkpoint(folder / "c", config())
    write(folder / "c", folder / "e", torch.float32)
    files.write_json(folder / "e/config.json", engines.config_of(folder / "e") | values)
    return str(folder / "e")


@pytest.mark.parametrize("width", [8, "8", [8], "[8]"])
def test_widths_as_public_trainers_write_them(tmp_path: Path, width: object) -> None:
    assert read(changed(tmp_path, inner_dim=width, emb_dim=width)).config.inner_dim == (8,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"emb_dim": "8.8"}, r"emb_dim is '8\.8': .* stack of widths"),
        ({"emb_dim": "wide"}, "emb_dim: 'wide' is not an integer"),
        ({"inner_dim": "10"}, "one width for the three"),
        ({"method": "medusa"}, "method medusa is gone"),
        ({"tie_weights": "yes"}, "tie_weights: .*boolean, found 'yes'"),
        ({"tie_weights": False}, r"(?s)Missing key.*emb\.1\.0\.weight"),
    ],
)
def test_another_network_is_not_read(tmp_path: Path, change: dict[str, object], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read(changed(tmp_path, **change))


def test_a_folder_of_arctic_training(tmp_path: Path) -> None:
    """pytorch_model.bin with a key for every head and gate, and a config.json as its trainer saves it."""
    c = config("sum_lstm", tie_lstm_embs=True, base_digest="")
    speculator = engines.checkpoint(tmp_path, c)
    values = {"architectures": ["ArcticLSTMSpeculatorPreTrainedModel"], "base_model_name_or_path": "some/base"}
    values |= dict.fromkeys(("inner_dim", "proj_dim", "emb_dim"), "8") | {"n_candidates": 3, "n_predict": 3}
    values |= {"tie_weights": True, "tie_lstm_embs": True, "model_type": "mlp_speculator", "scale_input": False}
    values |= {"transformers_version": "4.50.0", "vocab_size": 23, "input_hidden_dim": 12, "method": "sum_lstm"}
    files.write_json(tmp_path / "config.json", values)
    back = read(str(tmp_path))
    assert back.config == c
    states, tokens = inputs(c)
    assert torch.equal(back(states, tokens), speculator(states, tokens))

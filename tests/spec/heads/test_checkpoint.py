import dataclasses
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.nn import functional as F

from spec.heads import CheckpointError, Speculator, SpeculatorConfig, build, check_base, load, read_config, save

from .reference import config, inputs
from .test_speculator import configs, randomized


def saved(folder: Path, **changes: object) -> Speculator:
    c = config(**changes)
    speculator = randomized(c, None if c.draft_vocab_size is None else torch.arange(c.draft_vocab_size) + 1)
    save(speculator, folder)
    return speculator


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return state


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(c=configs())
def test_round_trip_is_bit_equal(tmp_path: Path, c: SpeculatorConfig) -> None:
    speculator = randomized(c)
    save(speculator, tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == c
    states, tokens = inputs(c)
    assert torch.equal(loaded(states, tokens), speculator(states, tokens))
    assert loaded.num_parameters() == speculator.num_parameters()
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in speculator.parameters()]
    assert loaded.state_dict().keys() == speculator.state_dict().keys() == weights(tmp_path).keys()


@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm"])
def test_stacks_train_save_load_and_draft(tmp_path: Path, method: str) -> None:
    dims = (6, 10)
    c = config(method, inner_dim=dims, emb_dim=dims, proj_dim=dims, n_predict=5)
    speculator = build(c)
    states, tokens = inputs(c, positions=20)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(speculator(states, tokens).flatten(0, 1), tokens.T.flatten())
        parameters = list(speculator.parameters())
        with torch.no_grad():
            for p, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p -= 0.3 * grad
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    save(speculator, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["inner_dim"] == "6.10"
    assert torch.equal(load(tmp_path).draft(states, tokens[:, 0]), speculator.draft(states, tokens[:, 0]))


def test_a_draft_vocabulary_comes_back(tmp_path: Path) -> None:
    speculator = saved(tmp_path, draft_vocab_size=4)
    loaded = load(tmp_path)
    ids = torch.arange(23)
    assert torch.equal(loaded.targets(ids), speculator.targets(ids))
    assert weights(tmp_path)["token_map"].tolist() == [1, 2, 3, 4]
    states, tokens = inputs(loaded.config)
    assert torch.equal(loaded.draft(states, tokens[:, 0]), speculator.draft(states, tokens[:, 0]))


def test_loaded_ties_hold_in_training(tmp_path: Path) -> None:
    saved(tmp_path, method="sum_lstm", tie_lstm_embs=True)
    loaded = load(tmp_path)
    assert loaded.head(0) is loaded.head(2)
    state = loaded.state_dict(keep_vars=True)
    assert state["input_emb.0.weight"] is state["forget_emb.0.weight"]


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    saved(tmp_path, vocab_size=5000)
    assert (tmp_path / "pytorch_model.bin").stat().st_size < 1.1 * 4 * 2 * 5000 * 8
    state = weights(tmp_path)
    assert state["head.0.weight"].data_ptr() == state["head.2.weight"].data_ptr()


def test_a_file_without_the_aliases_loads(tmp_path: Path) -> None:
    speculator = saved(tmp_path)
    state = weights(tmp_path)
    del state["head.1.weight"], state["head.2.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    states, tokens = inputs(speculator.config)
    assert torch.equal(load(tmp_path)(states, tokens), speculator(states, tokens))


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    state = weights(tmp_path)
    state["head.1.weight"] = state["head.1.weight"] + 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"head\.0\.weight and head\.1\.weight differ"):
        load(tmp_path)


def test_dtypes(tmp_path: Path) -> None:
    c = config(draft_vocab_size=3)
    speculator = randomized(c, torch.tensor([1, 2, 3]))
    save(speculator, tmp_path, dtype=torch.bfloat16)
    assert speculator.head(0).weight.dtype == torch.float32
    assert weights(tmp_path)["token_map"].dtype == torch.int64
    assert load(tmp_path).head(0).weight.dtype == torch.bfloat16
    back = load(tmp_path, dtype=torch.float32)
    assert back.head(0).weight.dtype == torch.float32
    assert torch.equal(back.head(0).weight, speculator.head(0).weight.bfloat16().float())


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    speculator = saved(tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b")
    save(speculator, tmp_path / "b")
    for name in ("pytorch_model.bin", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["config.json", "pytorch_model.bin"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speculator = saved(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(state: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        save(speculator, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_save_takes_no_wrapper(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not a Sequential"):
        save(torch.nn.Sequential(build(config())), tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "config.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    saved(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load(tmp_path)


def test_missing_and_unexpected_keys_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    state = weights(tmp_path)
    state["emb.0.weight"] = state.pop("emb.0.0.weight")
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"missing emb\.0\.0\.weight; unexpected emb\.0\.weight"):
        load(tmp_path)


def test_a_wrong_shape_is_named_with_both(tmp_path: Path) -> None:
    saved(tmp_path)
    state = weights(tmp_path)
    state["proj.0.0.weight"] = torch.zeros(8, 13)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"proj\.0\.0\.weight has shape \[8, 13\] .* \[8, 12\]"):
        load(tmp_path)


@pytest.mark.parametrize("size", [None, 4])
def test_config_and_weights_disagree_on_the_draft_vocabulary(tmp_path: Path, size: int | None) -> None:
    speculator = saved(tmp_path, draft_vocab_size=size)
    other = dataclasses.replace(speculator.config, draft_vocab_size=4 if size is None else None)
    (tmp_path / "config.json").write_text(json.dumps(other.to_json()))
    with pytest.raises(CheckpointError, match=f"draft_vocab_size {other.draft_vocab_size}, .* token_map"):
        load(tmp_path)


def test_a_token_map_of_another_size(tmp_path: Path) -> None:
    speculator = saved(tmp_path, draft_vocab_size=4)
    other = dataclasses.replace(speculator.config, draft_vocab_size=5)
    (tmp_path / "config.json").write_text(json.dumps(other.to_json()))
    with pytest.raises(CheckpointError, match=r"token_map has shape \[4\], expected \[5\]"):
        load(tmp_path)


class _Code:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("ran",)


def test_code_in_a_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))):
        write({"x": _Code()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="something other than tensors"):
            load(tmp_path)
    assert not Path("ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04half"])
def test_a_torn_file_is_refused(tmp_path: Path, content: bytes) -> None:
    saved(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load(tmp_path)


def test_not_a_state_dict(tmp_path: Path) -> None:
    saved(tmp_path)
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds a list"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '{"model_type": "llama", "hidden_size": 4}'])
def test_not_a_speculators_config(tmp_path: Path, text: str) -> None:
    saved(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_check_base() -> None:
    c = config()
    check_base(c, 23, 12, "d1")
    check_base(c, 23, 12, "other", allow_other_weights=True)
    with pytest.raises(CheckpointError, match=r"vocab_size: .* some/base with 23, this base has 24"):
        check_base(c, 24, 12, "d1", allow_other_weights=True)
    with pytest.raises(CheckpointError, match=r"hidden_size: .* with 12, this base has 13"):
        check_base(c, 23, 13, "d1")
    with pytest.raises(CheckpointError, match=r"base_digest: .* weights d1, this base's are d2"):
        check_base(c, 23, 12, "d2")

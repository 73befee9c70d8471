import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from spec.heads import CheckpointError, Speculator, SpeculatorConfig, check_base, load, read_config, save

from .reference import config, inputs, randomized
from .test_speculator import configs


def saved(folder: Path, **changes: object) -> Speculator:
    speculator = randomized(config(**changes))
    save(speculator, folder)
    return speculator


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(c=configs())
def test_round_trip_is_bit_equal(tmp_path: Path, c: SpeculatorConfig) -> None:
    speculator = randomized(c)
    save(speculator, tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == c
    states, tokens = inputs(c)
    assert torch.equal(loaded(states, tokens), speculator(states, tokens))
    assert loaded.num_parameters() == speculator.num_parameters()  # ties hold
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in speculator.parameters()]
    assert loaded.state_dict().keys() == speculator.state_dict().keys() == weights(tmp_path).keys()


def test_tied_weights_are_stored_once_under_any_of_their_names(tmp_path: Path) -> None:
    speculator = saved(tmp_path, vocab_size=5000)
    assert (tmp_path / "pytorch_model.bin").stat().st_size < 1.1 * 4 * 2 * 5000 * 8
    state = weights(tmp_path)
    assert state["head.0.weight"].data_ptr() == state["head.2.weight"].data_ptr()
    del state["head.0.weight"], state["head.2.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    states, tokens = inputs(speculator.config)
    assert torch.equal(load(tmp_path)(states, tokens), speculator(states, tokens))


def test_dtypes_and_a_draft_vocabulary(tmp_path: Path) -> None:
    c = config(draft_vocab_size=3)
    speculator = randomized(c, torch.tensor([1, 2, 4]))
    save(speculator, tmp_path, dtype=torch.bfloat16)
    assert speculator.head(0).weight.dtype == torch.float32
    assert weights(tmp_path)["token_map"].dtype == torch.int64
    assert load(tmp_path).head(0).weight.dtype == torch.bfloat16
    back = load(tmp_path, dtype=torch.float32)
    assert torch.equal(back.head(0).weight, speculator.head(0).weight.bfloat16().float())
    assert back.draft_index[:6].tolist() == [-1, 0, 1, -1, 2, -1]


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

    def full(state: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        save(speculator, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "config.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    saved(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"emb.0.weight": state.pop("emb.0.0.weight")}, r"(?s)emb\.0\.0\.weight.*emb\.0\.weight"),
        (lambda state: state | {"proj.0.0.weight": torch.zeros(8, 13)}, r"proj\.0\.0\.weight.*\[8, 13\].*\[8, 12\]"),
        (lambda state: state | {"head.1.weight": state["head.1.weight"] + 1}, r"head\.0\.weight and head\.1\S* diff"),
        (lambda state: state | {"token_map": torch.arange(4)}, "token_map of 4 ids was given.* is None"),
        (lambda state: [1, 2], "holds a list"),
        (lambda state: {"x": 1}, "names and tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change: Callable[..., Any], message: str) -> None:
    saved(tmp_path)
    torch.save(change(weights(tmp_path)), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


class _Code:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("ran",)


def test_code_in_a_pickle_and_a_torn_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))):
        write({"x": _Code()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="something other than tensors"):
            load(tmp_path)
    assert not Path("ran").exists()
    for torn in (b"", b"PK\x03\x04half"):
        (tmp_path / "pytorch_model.bin").write_bytes(torn)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '{"model_type": "llama", "hidden_size": 4}'])
def test_not_a_speculators_config(tmp_path: Path, text: str) -> None:
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

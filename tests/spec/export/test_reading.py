"""What is not read, whatever the format."""

import os
from pathlib import Path

import pytest
import torch

from spec import files, heads
from spec.base import BaseError
from spec.export import FORMATS, KnownBase, identify_base, read, write
from spec.heads import CheckpointError
from tests.spec.export import engines
from tests.spec.heads.reference import config
from tests.tiny import HIDDEN_SIZE, VOCAB_SIZE

KNOWN = KnownBase(name="here/it-is", revision="r1", digest="d1", vocab_size=23, hidden_size=12)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    engines.checkpoint(tmp_path / "c", config())
    write(tmp_path / "c", tmp_path / "e", FORMATS["arctic"], torch.float32)
    return tmp_path / "e"


def change(folder: Path, **values: object) -> None:
    files.write_json(folder / "config.json", {**engines.config_of(folder), **values})


def test_a_base_at_hand(exported: Path) -> None:
    found = read(str(exported), KNOWN).config
    assert (found.base_model_name_or_path, found.base_revision, found.base_digest) == ("here/it-is", "r1", "d1")
    change(exported, base_digest=None)
    assert read(str(exported), KNOWN).config.base_digest == "d1"
    assert read(str(exported)).config.base_digest == ""


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"vocab_size": 24}, "vocab_size: .* with 23, this base has 24"),
        ({"hidden_size": 13}, "hidden_size: .* with 12, this base has 13"),
        ({"digest": "d2"}, "base_digest: .* weights d1, this base's are d2"),
    ],
)
def test_another_base(exported: Path, other: dict[str, object], words: str) -> None:
    known = KnownBase(**{**vars(KNOWN), **other})
    with pytest.raises(CheckpointError, match=words):
        read(str(exported), known)


def test_an_unknown_digest_is_no_error_later(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(exported, base_digest=None)
    unknown = read(str(exported)).config
    heads.check_base(unknown, 23, 12, "whatever")
    assert "does not say which weights of some/base it was trained on" in caplog.text
    with pytest.raises(CheckpointError, match="vocab_size"):
        heads.check_base(unknown, 24, 12, "whatever")


def test_a_base_is_identified_without_being_loaded(base_folder: Path) -> None:
    known = identify_base(str(base_folder))
    assert (known.vocab_size, known.hidden_size, known.revision) == (VOCAB_SIZE, HIDDEN_SIZE, None)
    assert len(known.digest) == 64
    with pytest.raises(BaseError, match=r"no folder '\./nowhere'"):
        identify_base("./nowhere")


@pytest.mark.parametrize("source", ["nowhere", "./a/b", "a/b/c"])
def test_neither_a_folder_nor_an_id(source: str) -> None:
    with pytest.raises(CheckpointError, match=f"no folder '{source}'; give a folder or a hub id"):
        read(source)


def test_the_hub_that_does_not_answer() -> None:
    with pytest.raises(CheckpointError, match="'nobody/has-this' is no local folder and could not be downloaded"):
        read("nobody/has-this")


def test_a_checkpoint_of_ours(exported: Path) -> None:
    with pytest.raises(CheckpointError, match="of this project already; it needs no import"):
        read(str(exported.parent / "c"))


@pytest.mark.parametrize("text", ["[]", "{", '{"model_type": "llama", "hidden_size": 4}'])
def test_no_speculators_config(exported: Path, text: str) -> None:
    (exported / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read(str(exported))
    (exported / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read(str(exported))


class _Code:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("ran",)


def test_code_in_a_pickle_never_runs(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (exported / "model.safetensors").unlink()
    torch.save({"emb.0.0.weight": _Code()}, exported / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="something other than tensors"):
        read(str(exported))
    assert not Path("ran").exists()


@pytest.mark.parametrize("names", [["../c/pytorch_model.bin"], ["absent.safetensors"], "x", None])
def test_an_index_that_leads_elsewhere(exported: Path, names: object) -> None:
    (exported / "model.safetensors").unlink()
    weight_map = {f"w{i}": name for i, name in enumerate(names)} if isinstance(names, list) else names
    files.write_json(exported / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json (lists|is no index)"):
        read(str(exported))


def test_torn_and_missing_weights(exported: Path) -> None:
    (exported / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read(str(exported))
    (exported / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights: neither model\.safetensors nor pytorch_model\.bin"):
        read(str(exported))

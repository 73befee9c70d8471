"""An export: dtypes, the folder, the card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from spec import files
from spec.export import ExportError, measured_on, read, read_architectures, write
from tests.spec.export import engines
from tests.spec.heads.reference import config

OFFLINE: dict[str, Any] = {"tokens_per_step": 1.75, "tokens_per_step_low": 1.61, "tokens_per_step_high": 1.89}
OFFLINE |= {"acceptance": {"1": 0.5, "2": 0.25, "3": 0.125}, "answers": 64, "written_by_base": 0.5}
FIGURES: dict[str, Any] = {
    "offline": OFFLINE,
    "ngram": {"tokens_per_step": 1.54},
    "decode": {"draft": "hybrid", "speedup": 1.37, "lossless": True, "prompts": 4},
    "domains": {"maths": {"tokens_per_step": 1.91, "ngram_tokens_per_step": 1.58}},
}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    speculator = engines.checkpoint(tmp_path / "c", config())
    write(tmp_path / "c", tmp_path / "e", dtype)
    found = engines.tensors(tmp_path / "e")
    assert {weight.dtype for weight in found.values()} == {dtype}
    assert engines.config_of(tmp_path / "e")["torch_dtype"] == str(dtype).removeprefix("torch.")
    back = read(str(tmp_path / "e")).state_dict()
    for name, weight in speculator.state_dict().items():
        assert torch.equal(back[name], weight.to(dtype))


def test_a_weight_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    speculator = engines.checkpoint(tmp_path / "c", config())
    with torch.no_grad():
        speculator.head(0).weight[0, 0] = 1e5
    engines.heads.save(speculator, tmp_path / "c")
    with pytest.raises(ExportError, match=r"head\.0\.weight has values that float16 cannot hold; bfloat16"):
        write(tmp_path / "c", tmp_path / "e", torch.float16)
    assert not (tmp_path / "e").exists()
    write(tmp_path / "c", tmp_path / "e", torch.bfloat16)


def test_the_base_goes_with_it(tmp_path: Path) -> None:
    engines.checkpoint(tmp_path / "c", config(base_revision="abc"))
    write(tmp_path / "c", tmp_path / "e", torch.float32)
    values = engines.config_of(tmp_path / "e")
    found = [values[f"base_{name}"] for name in ("model_name_or_path", "revision", "digest")]
    assert found == ["some/base", "abc", "d1"]
    written = write(tmp_path / "c", tmp_path / "e", torch.float32, base="/models/its base")
    assert written.config.base_model_name_or_path == "/models/its base"
    values = engines.config_of(tmp_path / "e")
    assert (values["base_model_name_or_path"], values["base_digest"]) == ("/models/its base", "d1")
    assert "base_revision" not in values
    assert "vllm serve '/models/its base' " in written.command


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    engines.checkpoint(tmp_path / "a", config())
    engines.checkpoint(tmp_path / "b", config(n_predict=2))
    write(tmp_path / "a", tmp_path / "e", torch.float32)
    write(tmp_path / "b", tmp_path / "e", torch.float32)
    assert engines.config_of(tmp_path / "e")["n_predict"] == 2
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "e"]
    mode = (tmp_path / "a/config.json").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "e").iterdir()} == {mode}


def test_a_failure_leaves_the_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines.checkpoint(tmp_path / "c", config())
    write(tmp_path / "c", tmp_path / "e", torch.float32)
    before = content(tmp_path / "e")

    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("spec.export.writing.save_file", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path / "c", tmp_path / "e", torch.bfloat16)
    assert content(tmp_path / "e") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "e"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["notes.txt"], r"holds notes\.txt; name a folder that is empty"),
        (["config.json", "model.safetensors"], "holds a model that no export made"),
        (["README.md", "config.json", "model.safetensors"], "holds a model that no export made"),
    ],
)
def test_what_is_in_the_way_stays(tmp_path: Path, names: Sequence[str], words: str) -> None:
    engines.checkpoint(tmp_path / "c", config())
    (tmp_path / "e").mkdir()
    for name in names:
        (tmp_path / "e" / name).write_text("somebody's")
    before = content(tmp_path / "e")
    with pytest.raises(ExportError, match=words):
        write(tmp_path / "c", tmp_path / "e", torch.float32)
    assert content(tmp_path / "e") == before
    with pytest.raises(ExportError, match="is a file; name a folder"):
        write(tmp_path / "c", tmp_path / "e" / names[0], torch.float32)


def test_the_card_of_measured_weights(tmp_path: Path) -> None:
    source = tmp_path / "models/speculator"
    engines.checkpoint(source, config(base_revision="abc"))
    digest = files.digest_file(source / "pytorch_model.bin")
    files.write_json(tmp_path / "results/train/details.json", {"features": "f00d", "speculator": digest})
    files.write_json(tmp_path / "results/evaluate/details.json", {**FIGURES, "speculator": digest})
    measured = measured_on(source)
    (tmp_path / "pytorch_model.bin").write_bytes((source / "pytorch_model.bin").read_bytes())
    assert measured_on(tmp_path) == measured  # as the guide's script lays it out
    written = write(source, tmp_path / "e", torch.bfloat16, measured=measured)
    card = (tmp_path / "e/README.md").read_text()
    for words in (
        "base_model: some/base",
        "| base | `some/base`, revision `abc` |",
        "| weights of the base | `d1` |",
        "| method | sum_rnn, 3 heads, width 8, tied weights |",
        "| trained on | features `f00d` |",
        f"| exported from | pytorch_model.bin `{digest}` |",
        f"```bash\n{written.command}\n```",
        "| maths | 1.91 | 1.58 |",
        "| all | 1.75 | 1.54 |",
        "95 % interval 1.61 to 1.89 over 64 answers; acceptance by position 0.50 0.25 0.12",
        "50% of the answers were not written greedily by the base",
        "1.37 times as fast as plain decoding, drafting by `hybrid`",
        "identical to plain greedy decoding in float32: yes",
    ):
        assert words in card


def test_figures_of_other_weights_are_not_on_the_card(tmp_path: Path) -> None:
    source = tmp_path / "models/speculator"
    engines.checkpoint(source, config(base_digest=""))
    files.write_json(tmp_path / "results/train/details.json", {"features": "f00d", "speculator": "another"})
    files.write_json(tmp_path / "results/evaluate/details.json", FIGURES)
    write(source, tmp_path / "e", torch.bfloat16, measured=measured_on(source))
    card = (tmp_path / "e/README.md").read_text()
    assert "f00d" not in card
    assert "1.75" not in card
    assert "Not measured: no evaluation of these weights" in card
    assert "| trained on | not known |" in card
    assert "| weights of the base | not known |" in card
    assert "base_model:" not in card  # a folder's name means nothing elsewhere
    assert "base_digest" not in engines.config_of(tmp_path / "e")


def test_architectures_of_a_base(base_folder: Path, tmp_path: Path) -> None:
    assert read_architectures(str(base_folder), None) == ["GPT2LMHeadModel"]
    assert read_architectures(str(tmp_path / "nowhere"), None) == []
    assert read_architectures("nobody/has-this", "main") == []

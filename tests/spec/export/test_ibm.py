"""IBM's published speculators are read, for warm starts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spec import files
from spec.export import read
from spec.heads import CheckpointError
from tests.spec.export import engines
from tests.spec.heads.reference import config


def accelerator(folder: Path, tied: bool, **changes: object) -> engines.Speculator:
    """A folder as IBM publishes them: float16, no word of the base; tied keys are there for every head."""
    speculator = engines.checkpoint(
        folder / "c", config(tie_weights=tied, inner_dim=(12,), emb_dim=(12,), proj_dim=(12,))
    )
    state = {name: weight.half() for name, weight in speculator.state_dict().items()}
    public = {}
    for i in range(3):
        k, j = (0, min(i, 1)) if tied else (i, i)
        public |= {
            f"speculator.emb.{i}.weight": state[f"emb.{k}.0.weight"],
            f"speculator.proj.{i}.weight": state[f"proj.{j}.0.weight"],
            f"speculator.head.{i}.weight": state[f"head.{k}.weight"],
            f"speculator.ln.{i}.weight": state[f"ln.{k}.0.weight"],
            f"speculator.ln.{i}.bias": state[f"ln.{k}.0.bias"],
        }
    values = {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "emb_dim": 12,
        "inner_dim": 0,
        "model_type": "mlp_speculator",
        "n_candidates": 5,
        "n_predict": 3,
        "top_k_tokens_per_head": [5, 4, 3],
        "torch_dtype": "float16",
        "transformers_version": "4.38.2",
        "vocab_size": 23,
        **({"tie_weights": True} if tied else {}),
    }
    files.write_json(folder / "config.json", {**values, **changes})
    torch.save(public, folder / "pytorch_model.bin")
    return speculator.half()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("parts", ["bin", "safetensors", "shards"])
def test_a_published_accelerator(tmp_path: Path, tied: bool, parts: str) -> None:
    speculator = accelerator(tmp_path, tied, base_model_name_or_path="some/base")
    if parts != "bin":
        state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
        (tmp_path / "pytorch_model.bin").unlink()
        half = {name: weight.clone() for name, weight in state.items() if "emb" in name}
        rest = {name: weight.clone() for name, weight in state.items() if "emb" not in name}
        if parts == "safetensors":
            save_file(half | rest, tmp_path / "model.safetensors")
        else:
            save_file(half, tmp_path / "model-00001-of-00002.safetensors")
            save_file(rest, tmp_path / "model-00002-of-00002.safetensors")
            names = {**dict.fromkeys(half, "model-00001-of-00002.safetensors")}
            names |= dict.fromkeys(rest, "model-00002-of-00002.safetensors")
            files.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": names})
    back = read(str(tmp_path))
    assert back.config.base_digest == ""
    assert back.config.inner_dim == (12,)
    assert back.head(0).weight.dtype == torch.float16
    assert back.state_dict().keys() == speculator.state_dict().keys()
    assert all(torch.equal(weight, back.state_dict()[name]) for name, weight in speculator.state_dict().items())


def test_tied_weights_that_differ(tmp_path: Path) -> None:
    accelerator(tmp_path, True, base_model_name_or_path="some/base")
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    state["speculator.emb.2.weight"] = state["speculator.emb.2.weight"] + 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"emb\.0\.0\.weight and emb\.2\.0\.weight differ"):
        read(str(tmp_path))


@pytest.mark.parametrize("changes", [{"inner_dim": 8}, {"vocab_size": "23"}, {"n_predict": 0}, {"tie_weights": 1}])
def test_values_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, object]) -> None:
    accelerator(tmp_path, True, base_model_name_or_path="some/base", **changes)
    with pytest.raises(CheckpointError, match="|".join([*changes, "shape"])):
        read(str(tmp_path))


def test_a_base_that_nobody_names(tmp_path: Path) -> None:
    accelerator(tmp_path, False)
    with pytest.raises(CheckpointError, match="does not name the base; say which it is with --base"):
        read(str(tmp_path))

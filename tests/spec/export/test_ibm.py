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
    c = config(tie_weights=tied, **dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), (12,)))
    speculator = engines.checkpoint(folder / "c", c)
    state = {name: weight.half() for name, weight in speculator.state_dict().items()}
    public = {}
    for i in range(3):
        k, j = (0, min(i, 1)) if tied else (i, i)
        names = {"emb": f"emb.{k}.0.weight", "proj": f"proj.{j}.0.weight", "head": f"head.{k}.weight"}
        public |= {f"speculator.{name}.{i}.weight": state[ours] for name, ours in names.items()}
        public |= {f"speculator.ln.{i}.{part}": state[f"ln.{k}.0.{part}"] for part in ("weight", "bias")}
    values = {"architectures": ["MLPSpeculatorPreTrainedModel"], "emb_dim": 12, "inner_dim": 0, "n_candidates": 5}
    values |= {"model_type": "mlp_speculator", "n_predict": 3, "top_k_tokens_per_head": [5, 4, 3], "vocab_size": 23}
    values |= {"torch_dtype": "float16", "transformers_version": "4.38.2"} | ({"tie_weights": True} if tied else {})
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

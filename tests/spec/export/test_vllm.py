"""EAGLE-3 heads for stock vLLM, and public ones; vLLM itself loads one in tests/vllm."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spec import files, heads
from spec.export import VLLM, ExportError, read, write, writing
from spec.heads import LAST, CheckpointError, OnBase, Packed, Speculator
from spec.heads.eagle3 import Eagle3Config
from tests.spec.export import engines
from tests.spec.heads import reference
from tests.spec.heads.reference import config as recurrent

D, V, T = 12, 23, 30
LAYER = {"heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate_size": 16, "rope_theta": 500.0, "positions": 64}
KNOWN = OnBase(base_model_name_or_path="some/base", base_digest="d1", vocab_size=V, hidden_size=D, layers=30)


def config(layer: dict[str, object] | None = None, **changes: Any) -> Eagle3Config:
    return reference.eagle3({**LAYER, **(layer or {})}, **{"layers": 30, **changes})


def checkpoint(folder: Path, c: Eagle3Config) -> Speculator:
    """A random head, with the base's embedding."""
    return engines.checkpoint(folder, c)


def drafts_of(head: Speculator, outputs: Tensor, ids: Tensor, n: int) -> list[list[int]]:
    """Behind every position of a sequence; outputs [T, A d]."""
    packed = Packed.of(ids, torch.ones(T, dtype=torch.bool), [T], {})
    states = dict(zip(head.taps[:-1], outputs.split(D, 1), strict=True)) | {LAST: torch.zeros(T - 1, D)}
    return head.draft_along(replace(packed, states=states), torch.arange(T - 1), n).tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"draft_vocab_size": 9, "layer": {"bias": True}},
        {"draft_vocab_size": V, "aux_layers": [3]},
        {"layers": 2, "layer": {"kv_heads": 4, "eps": 1e-3}, "norm_output": True},
    ],
)
def test_the_engine_drafts_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    c = config(**changes)
    head = checkpoint(tmp_path / "c", c)
    write(tmp_path / "c", tmp_path / "e", torch.float32, form=VLLM)
    outputs, ids = torch.randn(T, (len(head.taps) - 1) * D), torch.randint(V, (T,))
    engine = engines.vllm(tmp_path / "e", head.embed_tokens.weight.detach())
    expected = drafts_of(head, outputs, ids, 5)
    assert [engine(outputs[: t + 1], ids[1 : t + 2], 5) for t in range(T - 1)] == expected
    assert len({tuple(row) for row in expected}) > 9
    stored = engines.tensors(tmp_path / "e")
    if head.token_map is not None and "d2t" in stored:
        assert torch.equal(stored["d2t"] + torch.arange(9), head.token_map)
        assert torch.equal(stored["t2d"].nonzero()[:, 0], head.token_map)
    back = read(str(tmp_path / "e"))
    if c.draft_vocab_size != V:
        assert back.config == c
    back.lend({"embedding": head.embed_tokens.weight.detach()})
    assert drafts_of(back, outputs, ids, 5) == expected


def test_the_card_and_the_command(tmp_path: Path) -> None:
    checkpoint(tmp_path / "c", config(base_revision="abc", draft_vocab_size=9))
    written = write(tmp_path / "c", tmp_path / "e", form=VLLM)
    assert engines.config_of(tmp_path / "e")["torch_dtype"] == "float32"
    assert "vllm serve some/base --revision abc" in written.command
    assert f'{{"method": "eagle3", "model": "{tmp_path / "e"}", "num_speculative_tokens": 3}}' in written.command
    card = (tmp_path / "e/README.md").read_text()
    for words in (
        "| method | eagle3, one attention layer, reads the base after layers 2, 15, 27 |",
        "| drafts from | 9 tokens |",
        "The format is `vllm`; it was trained to draft 3 tokens",
        written.command,
    ):
        assert words in card


def test_an_export_that_drafts_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "c", config())
    whole = writing.save_file

    def other(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        whole({name: tensor.flip(0) if name == "fc.weight" else tensor for name, tensor in tensors.items()}, path)

    monkeypatch.setattr(writing, "save_file", other)
    with pytest.raises(ExportError, match="drafts other tokens than the checkpoint"):
        write(tmp_path / "c", tmp_path / "e", torch.float32, form=VLLM)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"head_dim": 6}, "4 heads of width 6 with 2 for keys and values; vLLM has no attention"),
        ({"head_dim": 520}, "a multiple of 8 and at most 512"),
        ({"kv_heads": 3}, "with 3 for keys"),
    ],
)
def test_widths_that_vllm_cannot_load(tmp_path: Path, layer: dict[str, object], words: str) -> None:
    files.write_json(tmp_path / "c/config.json", config(layer).to_json())
    with pytest.raises(ExportError, match=words):
        write(tmp_path / "c", tmp_path / "e", form=VLLM)


def test_each_format_refuses_the_others_methods(tmp_path: Path) -> None:
    for method in ("sum_rnn", "sum_lstm"):
        engines.checkpoint(tmp_path / method, recurrent(method))
        with pytest.raises(ExportError, match=f"format vllm holds eagle3, .* is {method}.*arctic holds sum_rnn"):
            write(tmp_path / method, tmp_path / "e", form=VLLM)
    checkpoint(tmp_path / "c", config())
    with pytest.raises(ExportError, match=r"format arctic holds sum_rnn and sum_lstm, .* is eagle3.*vllm holds eagle3"):
        write(tmp_path / "c", tmp_path / "e")
    files.write_json(tmp_path / "l/config.json", config(aux_layers=[30]).to_json())
    with pytest.raises(ExportError, match="layers 0 to 29"):
        write(tmp_path / "l", tmp_path / "e", form=VLLM)


# As the authors publish theirs.
PUBLIC = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_act": "silu", "pad_token_id": 0}
PUBLIC |= {"hidden_size": D, "vocab_size": V, "draft_vocab_size": 9, "intermediate_size": 16, "rms_norm_eps": 1e-5}
PUBLIC |= {"num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 1, "max_position_embeddings": 64}
PUBLIC |= {"tie_word_embeddings": False}


def public(folder: Path, norm_output: bool = False, **changes: Any) -> tuple[Speculator, str]:
    """A folder of the authors', and the head in it."""
    layer = {"heads": 3, "kv_heads": 1, "head_dim": 4, "rope_theta": 10000.0}
    head = checkpoint(folder, config(layer, n_predict=5, draft_vocab_size=9, norm_output=norm_output))
    (state := dict(head.state_dict())).pop("embed_tokens.weight")
    state["d2t"] = state.pop("token_map") - torch.arange(9)
    state["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill_(0, head.token_map, True)
    state["midlayer.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    torch.save(state | changes.pop("tensors", {}), folder / "pytorch_model.bin")
    files.write_json(folder / "config.json", PUBLIC | changes | ({"norm_output": True} if norm_output else {}))
    return head, str(folder)


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"norm_output": True},
        {"rope_theta": 10000.0, "rope_scaling": None, "norm_before_residual": False, "head_dim": 4},
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 15, 27], "use_aux_hidden_state": True}},
    ],
)
def test_a_public_folder_becomes_a_checkpoint(tmp_path: Path, written: dict[str, Any]) -> None:
    head, folder = public(tmp_path / "p", **written)
    back = read(folder, KNOWN)
    assert back.config == head.config
    heads.save(back, tmp_path / "back")
    table = {"embedding": head.embed_tokens.weight.detach()}
    loaded = heads.load(tmp_path / "back", tables=table)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in head.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_before_residual": True}, "norm_before_residual is True: another network"),
        ({"eagle_config": {"norm_before_fc": True}}, "norm_before_fc is True"),
        ({"fc_norm": True}, "fc_norm is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': another network than eagle3 here, which has 'silu'"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
        ({"target_hidden_size": 24}, "target_hidden_size is 24"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling is .*llama3.*plain rotary"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters is"),
        ({"attention_bias": True}, r"(?s)Missing key.*self_attn\.q_proj\.bias"),
        ({"tensors": {"embed_tokens.weight": torch.zeros(V, D)}}, "an embedding of its own"),
        ({"tensors": {"fc_norm.0.weight": torch.ones(D)}}, r"(?s)Unexpected key.*fc_norm\.0\.weight"),
        ({"tensors": {"t2d": torch.zeros(V, dtype=torch.bool)}}, "d2t and t2d name different tokens"),
        ({"tensors": {"d2t": torch.arange(9) * 9}}, r"token_map spans 0\.\.80"),
        ({"eagle_aux_hidden_state_layer_ids": [15, 2]}, "ascending order"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', expected a positive integer"),
    ],
)
def test_another_network_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read(public(tmp_path, **changes)[1], KNOWN)


def test_its_base_has_to_be_known(tmp_path: Path) -> None:
    folder = public(tmp_path, base_model_name_or_path="some/base")[1]
    with pytest.raises(CheckpointError, match="how many layers the base has; name the base with --base"):
        read(folder)

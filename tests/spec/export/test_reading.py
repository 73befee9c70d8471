"""What is not read, whatever the format."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from spec import files, heads
from spec.base import BaseError
from spec.export import VLLM, identify_base, read, write
from spec.heads import CheckpointError, OnBase
from tests.spec.export import engines, test_vllm
from tests.spec.heads.reference import config
from tests.tiny import HIDDEN_SIZE, VOCAB_SIZE

SHAPE = {"vocab_size": 23, "hidden_size": 12}
KNOWN = OnBase(base_model_name_or_path="here/it-is", base_revision="r1", base_digest="d1", **SHAPE)
ADAPTER, LLAMA = {"peft_type": "LORA"}, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN = {"architectures": ["Eagle3Qwen3ForCausalLM"], "model_type": "qwen3"}
LIBRARY = {"speculators_model_type": "eagle3", "speculators_config": {}, "draft_vocab_size": 5}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [
        *("eagle_config", "rope_parameters", "head_dim", "num_attention_heads", "target_num_hidden_layers"),
        *("eagle_aux_hidden_state_layer_ids", "norm_before_residual", "rms_norm_eps", "attention_bias"),
        *("model_type", "architectures", "method", "input_hidden_dim", "hidden_size", "emb_dim", "inner_dim"),
        *("proj_dim", "vocab_size", "n_predict", "tie_weights", "scale_input", "base_model_name_or_path"),
        *("base_digest", "speculators_config", "num_hidden_layers", "draft_vocab_size"),
    ]
)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    engines.checkpoint(tmp_path / "c", config())
    write(tmp_path / "c", tmp_path / "e", torch.float32)
    return tmp_path / "e"


def change(folder: Path, **values: object) -> None:
    files.write_json(folder / "config.json", {**engines.config_of(folder), **values})


def test_a_base_at_hand(exported: Path) -> None:
    found = read(str(exported), KNOWN).config
    assert (found.base_model_name_or_path, found.base_revision, found.base_digest) == ("here/it-is", "r1", "d1")
    change(exported, base_digest=None)
    assert read(str(exported), KNOWN).config.base_digest == "d1"
    assert read(str(exported)).config.base_digest == ""
    with pytest.raises(CheckpointError, match=r"vocab_size: .* with 23, this base has 24"):
        read(str(exported), KNOWN.model_copy(update={"vocab_size": 24}))


def test_an_unknown_digest_is_no_error_later(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(exported, base_digest=None)
    unknown = read(str(exported)).config
    heads.check_base(unknown, 23, 12, "whatever")
    assert "does not say which weights of some/base it was trained on" in caplog.text
    with pytest.raises(CheckpointError, match="vocab_size"):
        heads.check_base(unknown, 24, 12, "whatever")


def test_a_base_is_identified_without_being_loaded(base_folder: Path) -> None:
    known = identify_base(str(base_folder))
    assert (known.vocab_size, known.hidden_size, known.base_revision) == (VOCAB_SIZE, HIDDEN_SIZE, None)
    assert len(known.base_digest) == 64
    with pytest.raises(BaseError, match=r"no folder '\./nowhere'"):
        identify_base("./nowhere")


@pytest.mark.parametrize("source", ["nowhere", "nobody/has-this"])
def test_neither_a_folder_nor_an_id(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"no folder|no local folder and could not be downloaded"):
        read(source)


@pytest.mark.parametrize("names", [["../c/pytorch_model.bin"], ["absent.safetensors"], "x", None])
def test_an_index_that_leads_elsewhere(exported: Path, names: object) -> None:
    (exported / "model.safetensors").unlink()
    weight_map = {f"w{i}": name for i, name in enumerate(names)} if isinstance(names, list) else names
    files.write_json(exported / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json (names|is no index)"):
        read(str(exported))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles(exported: Path, zipped: bool) -> None:
    (exported / "model.safetensors").unlink()
    path = exported / "pytorch_model.bin"
    torch.save({"emb.0.0.weight": torch.zeros(2)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + b"\xff\x80" + whole[place + 2 :])
        with pytest.raises(CheckpointError):
            read(str(exported))


def test_torn_and_missing_files(exported: Path) -> None:
    (exported / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="not a whole file of weights"):
        read(str(exported))
    (exported / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights: neither model\.safetensors nor pytorch_model\.bin"):
        read(str(exported))
    (exported / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read(str(exported))


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("config.json", {"model_type": "medusa", "num_heads": 3}, r"Medusa's heads.*use sum_rnn or sum_lstm"),
        ("config.json", {"medusa_num_heads": 3, "base_model_name_or_path": "b"}, "Medusa's heads, with or without"),
        ("config.json", QWEN, "an EAGLE-3 head with a layer of 'qwen3'; only Llama's is read"),
        ("config.json", {"model_type": "eagle", "model": LLAMA}, "an EAGLE head"),
        ("config.json", {**LLAMA, "num_hidden_layers": 1}, "an EAGLE head"),
        ("config.json", LIBRARY, "of the library speculators .method 'eagle3'.*Readable: IBM's MLP speculators"),
        ("adapter_config.json", ADAPTER, "an adapter .*merge it into its base"),
        ("config.json", {**LLAMA, "num_hidden_layers": 2}, "a whole model .'llama'.*--base"),
        ("config.json", {"model_type": "whisper"}, "model_type 'whisper' cannot be imported"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, file: str, values: dict[str, object], words: str) -> None:
    files.write_json(tmp_path / file, values)
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=words):
        read(str(tmp_path))


def test_what_is_read_and_what_is_not_is_told(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    read(str(exported))
    (said,) = caplog.messages
    assert "is in Arctic's format: its weights and shape are read; not: n_candidates, num_attention_heads, tie" in said


@pytest.fixture(params=["arctic", "vllm"])
def either(request: pytest.FixtureRequest, exported: Path) -> Path:
    if request.param == "arctic":
        return exported
    test_vllm.checkpoint(exported.parent / "eagle3", test_vllm.config(draft_vocab_size=9))
    write(exported.parent / "eagle3", exported.parent / "v", form=VLLM)
    return exported.parent / "v"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(KEYS, JSON, max_size=4), dropped=st.sets(KEYS, max_size=2), raw=st.binary(max_size=9))
@example({"vocab_size": 10**30}, set(), b"").via("torch refuses it with a TypeError")
@example({"emb_dim": 10**12, "inner_dim": 10**12, "proj_dim": 10**12}, set(), b"").via("a RuntimeError")
@example({"n_predict": 10**9}, set(), b"").via("would take hours")
def test_whatever_config_json_holds_a_refusal_is_one_message(
    either: Path, changes: dict[str, object], dropped: set[str], raw: bytes
) -> None:
    whole = (either / "config.json").read_bytes()
    values = {name: value for name, value in json.loads(whole).items() if name not in dropped} | changes
    for content in (json.dumps(values).encode(), raw, whole[: len(raw)], whole.replace(b"8", raw, 1), b"[" * 100_000):
        (either / "config.json").write_bytes(content)
        with contextlib.suppress(CheckpointError):
            read(str(either))
    (either / "config.json").write_bytes(whole)

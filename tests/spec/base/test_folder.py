"""Finding a base's folder, downloading what is loaded, and what identifies it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from spec import base as base_model
from spec.base import BaseError, identify, load, resolve
from spec.config import Model

COMMIT = "0" * 40
CODE = (
    "import transformers as t\n"
    "class Config(t.GPT2Config):\n    model_type = 'own'\n"
    "class Model(t.GPT2LMHeadModel):\n    config_class = Config\n"
)
SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(BaseError, match=r"no config.json; this is not a model folder$"):
        resolve(str(folder), None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("checkpoint-5/config.json", "checkpoint-5/config.json is of a training run's checkpoint"),
        ("snapshots/0/config.json", "snapshots/0/config.json is in a hub's cache"),
        ("best/config.json", "best/config.json is of a model in a subfolder"),
        ("model-00001-of-00002.safetensors", "copy model.safetensors.index.json"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "accelerate merge-weights"),
        ("global_step5/a.pt", "zero_to_fp32.py"),
        ("model-q4.gguf", "GGUF"),
        ("adapter_config.json", "holds an adapter"),
        ("README.md", "no weights .*; copy them next to config.json"),
    ],
)
def test_how_weights_were_saved_is_said(folder: Path, name: str, words: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    with pytest.raises(BaseError, match=words):
        resolve(str(folder), None)


def test_a_folder_is_named_from_home_and_not_by_its_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve(f"~/{folder.name}", None) == folder
    assert base_model.downloaded_revision(folder, Model(partial_pretrain=f"~/{folder.name}")) is None
    with pytest.raises(BaseError, match=f"is a file; give the folder in which it lies, {folder}"):
        resolve(str(folder / "config.json"), None)


def test_weights_may_lie_in_a_subfolder_that_their_index_names(folder: Path) -> None:
    (folder / "parts").mkdir()
    (folder / "model.safetensors").rename(folder / "parts/1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "parts/1.safetensors"}}))
    assert load(Model(), resolve(str(folder), None), "", torch.device("cpu")).vocab_size
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "../1.safetensors"}}))
    with pytest.raises(BaseError, match="outside its folder"):
        resolve(str(folder), None)


@pytest.mark.parametrize("name", ["nowhere", "./owner/name", "/no/where", "a/b/c", "a" * 5000, "a\0b"])
def test_resolve_refuses_what_is_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(BaseError, match=r"no folder .*owner/name|is not the name of a folder"):
        resolve(name, None)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def new(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("new")


def replace_text(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("name", "change", "changed"),
    [
        ("model.safetensors", flip, {"weights"}),
        ("config.json", replace_text('"gelu_new"', '"gelu"'), {"weights"}),
        ("tokenizer.json", replace_text("<|endoftext|>", "<|endoftexx|>"), {"tokenizer"}),
        ("chat_template.jinja", replace_text("messages %}", "messages %} "), {"tokenizer"}),
        ("README.md", lambda path: path.write_text("a model"), set()),
        ("generation_config.json", replace_text('"eos_token_id": 2', '"eos_token_id": 5'), {"generation"}),
        *((name, new, {"tokenizer"}) for name in ("tekken.json", "cl100k.tiktoken", "sentencepiece.bpe.model")),
        *((name, new, {"tokenizer"}) for name in ("tokenizer.model", "chat_templates/tools.jinja")),
    ],
)
def test_identity_follows_content(folder: Path, name: str, change: Callable[[Path], None], changed: set[str]) -> None:
    before = identify(folder)
    assert identify(folder) == before
    change(folder / name)
    after = identify(folder)
    assert {key for key in before if before[key] != after[key]} == changed


def test_safetensors_go_before_bin_wherever_the_folder_is(folder: Path, base_folder: Path) -> None:
    before = identify(base_folder)
    (folder / "pytorch_model.bin").write_bytes(b"another format")
    assert identify(folder) == before
    (folder / "model.safetensors").unlink()
    assert identify(folder)["weights"] != before["weights"]
    assert resolve(str(folder), None) == folder


@pytest.fixture
def hub(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], Path]:
    """A hub that has the tiny base as owner/name, and copies of its weights under further names."""
    here = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    there = Path(shutil.copytree(base_folder, tmp_path / "there"))

    def download(name: str, *, revision: str | None, **patterns: Any) -> str:
        assert (name, revision) in {("owner/name", None), ("owner/name", COMMIT)}
        chosen = {key: patterns.get(key) for key in ("allow_patterns", "ignore_patterns")}
        names = [str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()]
        for each in filter_repo_objects(names, **chosen):
            (here / each).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there / each, here / each)
        return str(here)

    def add(files: dict[str, str]) -> Path:
        for name, content in files.items():
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            if content == "weights":
                shutil.copy(base_folder / "model.safetensors", there / name)
            else:
                (there / name).write_text(content)
        return there

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return add


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_of_a_hub_model_only_what_is_loaded_is_downloaded(hub: Callable[[dict[str, str]], Path]) -> None:
    copies = ("consolidated.safetensors", "original/model.safetensors", "onnx/model.onnx", "pytorch_model.bin")
    named = {"chat_templates/tools.jinja": "{{ 1 }}", "onnx/config.json": "{}"}
    hub({**dict.fromkeys(copies, "weights"), **named, "own.py": CODE})
    folder = resolve("owner/name", None)
    assert names_in(folder) == SMALL | {"model.safetensors", "chat_templates/tools.jinja"}
    assert resolve("owner/name", COMMIT) == folder


def test_of_weights_in_parts_those_that_the_index_names_are_downloaded(hub: Callable[[dict[str, str]], Path]) -> None:
    parts = {f"model-{i}.safetensors": "weights" for i in (1, 2, 3)}
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    there = hub({**parts, "model.safetensors.index.json": json.dumps(index)})
    (there / "model.safetensors").unlink()
    folder = resolve("owner/name", None)
    assert {name for name in names_in(folder) if name.endswith("safetensors")} == set(index["weight_map"].values())
    before = identify(folder)
    shutil.copy(there / "model-3.safetensors", folder)
    assert identify(folder) == before


def test_code_and_the_files_that_it_reads_come_where_they_are_trusted(hub: Callable[[dict[str, str]], Path]) -> None:
    there = hub({"own.py": CODE, "words.own": "a b", "README.md": "a model", "picture.png": ""})
    config = json.loads((there / "config.json").read_text())
    code = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (there / "config.json").write_text(json.dumps(config | code))
    folder = resolve("owner/name", None)
    assert "own.py" not in names_in(folder)
    with pytest.raises(BaseError, match="trust_remote_code"):
        load(Model(), folder, "")
    assert load(Model(trust_remote_code=True), folder, "", torch.device("cpu")).vocab_size
    shutil.rmtree(folder)
    folder = resolve("owner/name", None, trust_remote_code=True)
    assert names_in(folder) == SMALL | {"model.safetensors", "own.py", "words.own"}
    before = identify(folder, trust_remote_code=True)
    (folder / "words.own").write_text("b a")
    assert identify(folder, trust_remote_code=True)["tokenizer"] != before["tokenizer"]


def test_a_name_that_looks_like_a_folder_is_said_to_be_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseError, match=f"there is no {tmp_path}/models/mine, and the hub answered"):
        resolve("models/mine", None)

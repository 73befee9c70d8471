"""A base's folder: finding it, downloading what is loaded from it, and what identifies it."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from spec import files
from spec.config import Model
from spec.errors import SpecError

log = logging.getLogger(__name__)

_TOKENIZER = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|spiece|sentencepiece|tekken).*"
    r"|.*\.(model|tiktoken|jinja|bpe|spm)"
)
"""The files that a tokenizer reads; those in the folder chat_templates belong to them."""

_SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.spm", "*.bpe")
_SUBFOLDERS = "*/*"
_NOT_READ = (
    *("*.safetensors", "*.bin", "*.gguf", "*.onnx", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.npz"),
    *("*.md", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.pdf", "*.zip", "*.tar", "*.gz", ".*"),
)
"""Weights, documents and pictures: of what else lies next to a model's code, a tokenizer may read any file."""

_WHOLE = ("model.safetensors", "pytorch_model.bin")
"""Weights in one file, as transformers looks for them; each may have an index in its place."""

_REMEDIES = {
    "checkpoint-*/config.json": "is of a training run's checkpoint: give its folder",
    "snapshots/*/config.json": "is in a hub's cache: give its folder",
    "*/config.json": "is of a model in a subfolder: give that folder",
    "model-*-of-*.safetensors": "is a part of the weights: copy model.safetensors.index.json next to it",
    "pytorch_model-*-of-*.bin": "is a part of the weights: copy pytorch_model.bin.index.json next to it",
    "pytorch_model_fsdp*": "holds FSDP's parts: join them with `accelerate merge-weights`",
    "global_step*": "holds DeepSpeed's parts: join them with the zero_to_fp32.py next to it",
    "*.gguf": "holds GGUF weights, which are not read: take the model that they were made from",
    "consolidated*": "is in its maker's own layout: take the model in transformers' layout",
    "*/*.safetensors": "holds weights in a subfolder: copy config.json and weights into one folder",
    "model.*.safetensors": "has another name than model.safetensors: rename it if it holds the weights",
}
"""What tells how weights were saved, and what to do then; the first that is found is said."""


class BaseError(SpecError):
    """A base model that cannot be used: says which, what was found and what would fit."""


def one_line(error: BaseException | str) -> str:
    """The message of another library's error, on one line and without colours."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


@contextlib.contextmanager
def refusals(folder: Path, what: str) -> Iterator[None]:
    """Turn whatever a block raises into a BaseError of one line that names the folder."""
    try:
        yield
    except (BaseError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise BaseError(f"{folder}: {what} ({type(error).__name__}: {one_line(error)})") from error


def find_folder(name: str, patterns: Sequence[str]) -> Path:
    """The folder that a path or a hub id names; of a hub id, the files whose names match are downloaded."""
    return _local(name) or _download(name, None, patterns)


def resolve(name: str, revision: str | None, trust_remote_code: bool = False) -> Path:
    """The folder of a model with config and weights; of a hub model, what is loaded is downloaded.

    With trust_remote_code the model's code and the files that its tokenizer may read are downloaded as well.
    """
    folder = _local(name)
    if folder is None:
        folder = _download_model(name, revision)
        if trust_remote_code:
            add_code(folder)
    weights, has_config = weight_files(folder), (folder / "config.json").is_file()
    if weights and has_config:
        return folder
    if not weights and any(folder.glob("adapter_*")):
        base = "a base that it does not name"
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        raise BaseError(
            f"{folder} holds an adapter for {base}, not a whole model: merge the two with peft "
            f"(AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained(...)), "
            "save the tokenizer next to it, and give that folder"
        )
    found = [(path, what) for pattern, what in _REMEDIES.items() for path in sorted(folder.glob(pattern))]
    remedy = "".join(f". {path.relative_to(folder)} {what}" for path, what in found[:1])
    if not has_config:
        raise BaseError(f"{folder}: no config.json; this is not a model folder{remedy}")
    raise BaseError(
        f"{folder}: no weights (model.safetensors or pytorch_model.bin, or the parts that their index names)"
        + (remedy or "; copy them next to config.json")
    )


def _local(name: str) -> Path | None:
    """The folder of this name here."""
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, or one that no file can have
        raise BaseError(f"{name[:100]!r} is not the name of a folder or hub model ({one_line(error)})") from None
    if is_file:
        raise BaseError(f"{name} is a file; give the folder in which it lies, {path.parent}")
    return path if is_folder else None


def _download_model(name: str, revision: str | None) -> Path:
    """Download what transformers loads of a hub model, of one commit."""
    folder = _download(name, revision, _SMALL, _SUBFOLDERS)
    for whole in _WHOLE:
        _download(name, folder.name, ("config.json", whole, "chat_templates/*"))
        index = folder / f"{whole}.index.json"
        if not (folder / whole).is_file() and index.is_file():
            _download(name, folder.name, [str(path.relative_to(folder)) for path in _shards(index)])
        if weight_files(folder):
            break
    return folder


def add_code(folder: Path) -> None:
    """Download the code of a hub model that was resolved without it; other folders stay as they are."""
    repository, name = folder.parent.parent, folder.parent.parent.name
    if folder.parent.name == "snapshots" and name.startswith("models--") and not any(folder.glob("*.py")):
        hub_id = name.removeprefix("models--").replace("--", "/", 1)
        _download(hub_id, folder.name, ("*",), _SUBFOLDERS, *_NOT_READ, cache=repository.parent)


def _download(name: str, revision: str | None, wanted: Sequence[str], *ignored: str, cache: Path | None = None) -> Path:
    """Download a hub model's files of some names into the hub's cache."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise BaseError(f"no folder {name!r}; give a folder or a hub id such as owner/name")
    if Path(name).parent.is_dir():
        log.warning("there is no folder %s here; looking for a model of that name on the hub", name)
    from huggingface_hub import snapshot_download  # only where a hub is used

    patterns: dict[str, Any] = {"allow_patterns": list(wanted), "ignore_patterns": list(ignored)}
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, **patterns))
    except Exception as error:
        raise BaseError(
            f"{name!r} is no local folder and could not be downloaded: there is no {Path(name).absolute()}, and the "
            f"hub answered: {one_line(error)}; give the path of a folder, or the id of a model that can be reached "
            "(if it is private or asks you to accept terms on its page, after `hf auth login`)"
        ) from None


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
            raise ValueError("it names files outside its folder")
        return [index.parent / name for name in names]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BaseError(f"{index} is no index of weights ({one_line(error)}); copy it again") from None


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads: the first of _WHOLE that is there, or else what its index names."""
    for whole in _WHOLE:
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.is_file():
            shards = _shards(index)
            missing = [path.name for path in shards if not path.is_file()]
            if missing:
                count = f"{len(missing)} of {len(shards)} files that {index.name} names are missing"
                raise BaseError(f"{folder}: {count}, the first is {missing[0]}; copy every weight file of the model")
            return shards
    return []


def downloaded_revision(folder: Path, params: Model) -> str | None:
    """The commit that a hub model's folder holds (hub caches name folders by it); None for a local folder."""
    return None if _local(params.partial_pretrain) else folder.name


def identify(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Digests of what a base's output depends on.

    - weights: the weight files that are loaded, config.json, and where it is trusted the folder's own code.
    - tokenizer: the tokenizer's files and its chat template; where code is trusted, all files that it may read.
    - generation: generation_config.json, whose stop tokens end answers; states do not depend on it.
    """
    entries = sorted(p for p in folder.iterdir() if p.is_file())
    code = [p for p in entries if p.suffix == ".py" and trust_remote_code]
    weights = [folder / "config.json", *weight_files(folder), *code]
    generation = [p for p in entries if p.name == "generation_config.json"]
    others = sorted({*entries} - {*weights, *generation})
    never = (*_NOT_READ, "*.index.json", "*.py") if code else ("*",)
    read = [p for p in others if _TOKENIZER.fullmatch(p.name) or not any(fnmatch(p.name, each) for each in never)]
    templates = sorted(p for p in folder.glob("chat_templates/**/*") if p.is_file())
    parts = {"weights": weights, "tokenizer": [*read, *templates], "generation": generation}
    digests = files.digest_files([path for paths in parts.values() for path in paths])
    return {
        part: files.digest_json({p.relative_to(folder).as_posix(): digests[str(p)] for p in paths})
        for part, paths in parts.items()
    }

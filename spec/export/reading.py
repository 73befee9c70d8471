"""Read a speculator from a folder in a public format: IBM's (fms_extras/models/hf/modeling_mlp_speculator.py), that of
ArcticTraining and ArcticInference, or that of the EAGLE-3 authors, SpecForge and vLLM. Whatever else lies there is
refused by its name.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from spec import base, files, heads
from spec.base.folder import weight_files
from spec.config import Model
from spec.export import eagle3
from spec.heads import CheckpointError, OnBase, Speculator, SpeculatorConfig, SumRnnConfig, registry
from spec.heads.config import IGNORED_KEYS
from spec.section import parse_dims

log = logging.getLogger(__name__)

_ADAPTER = "adapter_config.json"
_DOWNLOADED = ["config.json", _ADAPTER, "*.safetensors", "*.bin", "*.index.json"]
_READ = "Readable: IBM's MLP speculators (fms), Arctic's MLP and LSTM speculators, and EAGLE-3 heads as vLLM loads them"
_NEUTRAL = IGNORED_KEYS - {"num_attention_heads", "num_hidden_layers"}
"""Keys that say nothing about the network."""


def identify_base(name: str, trust_remote_code: bool = False) -> OnBase:
    """A base on this machine as a speculator's config refers to it; a hub model is downloaded when it is not here yet.

    Raises:
        BaseError: there is no such base.
    """
    folder = base.resolve(name, None, trust_remote_code)
    config = base.read_config(folder, trust_remote_code).get_text_config()
    try:
        return OnBase(
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            layers=getattr(config, "num_hidden_layers", None),
            base_model_name_or_path=name,
            base_revision=base.downloaded_revision(folder, Model(partial_pretrain=name)),
            base_digest=base.identify(folder, trust_remote_code)["weights"],
        )
    except AttributeError as error:
        raise base.BaseError(f"{folder}: its config.json could not be read ({error})") from None


def read(source: str, known: OnBase | None = None) -> Speculator:
    """A speculator from a public checkpoint, its weights as they are stored; what it borrows from its base is not there
    until it is lent.

    Args:
        source: a folder or a hub id.
        known: its base, where that is at hand; without it the checkpoint has to name the base, and whether the weights
            are the right ones cannot be checked.

    Raises:
        CheckpointError: no such checkpoint, one that makes another network than ours, another base's, or one with
            anything but tensors in it.
    """
    try:
        folder = base.find_folder(source, _DOWNLOADED)
    except base.BaseError as error:
        raise CheckpointError(str(error)) from None
    values = _read_config(folder)
    layout = _layout_of(values, folder)
    try:
        fields = layout.fields(values, known.layers if known else None)
        config = registry.parse_config({**fields, **_base_fields(values, known)})
    except ValueError as error:  # CheckpointError is one, too
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    if known is not None:
        heads.check_base(config, known.vocab_size, known.hidden_size, known.base_digest)
    left = sorted(set(values) - type(config).model_fields.keys() - layout.keys - _NEUTRAL)
    log.info(
        "%s is in %s: its weights and shape are read; %s",
        folder,
        layout.name,
        f"not: {', '.join(left)}" if left else "nothing is left",
    )
    try:
        return heads.restore(config, layout.renamed(_read_state(folder), config), heads.no_tables(config))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except (RuntimeError, OverflowError, TypeError) as error:  # torch's, of sizes and types that no network has
        raise CheckpointError(f"{folder}: config.json and the weights make no network ({error})") from None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / _ADAPTER).is_file():
            raise CheckpointError(_adapter(folder))
        raise CheckpointError(f"{folder}: no config.json; this is not a speculator's folder. {_READ}")
    try:
        values = files.read_json(path)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


@dataclass(frozen=True)
class _Layout:
    """One of the formats.

    Attributes:
        name: for people.
        fields: what turns a config.json, and the number of the base's layers where that is known, into the fields of
            a SpeculatorConfig, but the base's.
        renamed: what gives the tensors our names.
        keys: of config.json that are read, and are no fields of ours.
    """

    name: str
    fields: Callable[[Mapping[str, Any], int | None], dict[str, Any]]
    renamed: Callable[[Mapping[str, Tensor], SpeculatorConfig], dict[str, Tensor]]
    keys: frozenset[str] = frozenset()


def _layout_of(values: Mapping[str, Any], folder: Path) -> _Layout:
    """The format that a config.json is in.

    Raises:
        CheckpointError: one that is not read; says what it is.
    """
    if values.get("model_type") == "mlp_speculator" and not any(name.startswith("speculators_") for name in values):
        if "input_hidden_dim" in values:
            return _Layout("Arctic's format", _arctic, _renamed, frozenset({"input_hidden_dim"}))
        if "emb_dim" in values and "hidden_size" not in values:
            return _Layout("IBM's format (fms)", _ibm, _renamed)
    if _is_eagle3(values) and values.get("model_type") == "llama" and "speculators_config" not in values:
        return _Layout("the format of EAGLE-3 heads", eagle3.fields, eagle3.renamed, eagle3.KEYS)
    raise CheckpointError(_refusal(values, folder))


def _is_eagle3(values: Mapping[str, Any]) -> bool:
    return "eagle3" in str(values.get("architectures")).lower() or "draft_vocab_size" in values


def _refusal(values: Mapping[str, Any], folder: Path) -> str:
    """What lies in a folder that is in neither format, and what would fit."""
    names = ("model_type", "architectures", "speculators_model_type")
    kind = " ".join(str(values.get(name, "")) for name in names).lower()
    method = values.get("speculators_model_type")
    path = folder / "config.json"
    if method is not None or "speculators_config" in values:
        return f"{path}: the format of the library speculators (method {method!r}), which is not read. {_READ}"
    if "medusa" in kind or any("medusa" in name for name in values):
        return f"{path}: Medusa's heads, with or without biases. {registry.GONE['medusa']}"
    if "model_type" in values and _is_eagle3(values) and "mlp_speculator" not in kind:
        return f"{path}: an EAGLE-3 head with a layer of {values['model_type']!r}; only Llama's is read. {_READ}"
    if "eagle" in kind or (values.get("num_hidden_layers") == 1 and "fc.weight" in _tensor_names(folder)):
        return f"{path}: an EAGLE head, which this project neither trains nor reads. {_READ}"
    if (folder / _ADAPTER).is_file():
        return _adapter(folder)
    try:
        heads.read_config(folder)
        return f"{folder} is a checkpoint of this project already; it needs no import"
    except CheckpointError as error:
        if "method" in values and "base_digest" in values:
            return f"{error} (a checkpoint of this project, by its keys)"
    if "num_hidden_layers" in values or "forcausallm" in kind:
        return (
            f"{path}: a whole model ({values.get('model_type')!r}), not a speculator; name a base with --base. {_READ}"
        )
    return f"{path}: model_type {values.get('model_type')!r} cannot be imported. {_READ}"


def _adapter(folder: Path) -> str:
    return (
        f"{folder}: an adapter ({_ADAPTER}), not a speculator; merge it into its base, and train one for that. {_READ}"
    )


def _tensor_names(folder: Path) -> set[str]:
    """The names of a folder's tensors; none where they cannot be read."""
    try:
        return set(_read_state(folder))
    except CheckpointError:
        return set()


def _arctic(values: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    widths = {name: _width(values, name) for name in ("inner_dim", "emb_dim", "proj_dim")}
    if len(set(widths.values())) > 1:
        raise CheckpointError(f"{widths}: the public network has one width for the three")
    return {
        "method": values.get("method", "sum_rnn"),
        "hidden_size": values.get("input_hidden_dim"),
        **{name: (width,) for name, width in widths.items()},
        **_shared(values),
    }


def _ibm(values: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    """There, emb_dim is the base's hidden size, and inner_dim the one width of the speculator (0: the base's)."""
    width = values["emb_dim"] if values.get("inner_dim", 0) == 0 else _width(values, "inner_dim")
    return {
        "method": "sum_rnn",
        "hidden_size": values["emb_dim"],
        **dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), (width,)),
        **_shared(values),
    }


def _shared(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is named alike in all of them; a switch that is missing is off, as the public classes have it."""
    switches = {name: values.get(name, False) for name in ("tie_weights", "tie_lstm_embs", "scale_input")}
    return {"vocab_size": values.get("vocab_size"), "n_predict": values.get("n_predict"), **switches}


def _width(values: Mapping[str, Any], name: str) -> int:
    """One width, in any of the ways that public trainers write it: 4096, "4096", [4096], "[4096]"."""
    value = values.get(name)
    try:
        dims = parse_dims(value.strip("[]") if isinstance(value, str) else value)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None
    if len(dims) > 1:
        raise CheckpointError(
            f"{name} is {value!r}: from a stack of widths public code builds another network than this "
            "project; only a head of one width can be imported"
        )
    return dims[0]


def _base_fields(values: Mapping[str, Any], known: OnBase | None) -> dict[str, Any]:
    """What names the base; a digest is that of the weights that the head was trained on."""
    name, revision, digest = (values.get(f"base_{key}") for key in ("model_name_or_path", "revision", "digest"))
    if known is not None:
        name, revision, digest = known.base_model_name_or_path, known.base_revision, digest or known.base_digest
    if not name:
        raise CheckpointError("it does not name the base; say which it is with --base")
    return {"base_model_name_or_path": name, "base_revision": revision, "base_digest": digest or ""}


def _read_state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder; safetensors are preferred."""
    try:
        paths = weight_files(folder)
    except base.BaseError as error:
        raise CheckpointError(str(error)) from None
    if not paths:
        raise CheckpointError("no weights: neither model.safetensors nor pytorch_model.bin, nor an index of parts")
    state: dict[str, Tensor] = {}
    for path in paths:
        try:
            state |= load_file(path) if path.suffix == ".safetensors" else heads.read_weights(path)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle makes torch raise anything
            raise CheckpointError(f"{path} is not a whole file of weights: {error!r}") from None
    return state


def _renamed(state: Mapping[str, Tensor], config: SpeculatorConfig) -> dict[str, Tensor]:
    """The tensors under our names; what we have no name for keeps its own, and is refused later."""
    found = {
        # IBM's emb.0.weight is emb.0.0.weight here
        re.sub(r"^(emb|proj|ln)\.(\d+)\.(weight|bias)$", r"\1.\2.0.\3", key.removeprefix("speculator.")): tensor
        for key, tensor in state.items()
    }
    if not isinstance(config, SumRnnConfig) or not config.tie_weights:
        return found
    for name in list(found):  # files of torch.save have a key for every head, tied or not
        alias = re.match(r"(emb|ln|proj)\.(\d+)\.(.*)", name)
        last = 1 if name.startswith("proj.") else 0
        if alias is None or int(alias[2]) <= last:
            continue
        shared = f"{alias[1]}.{last}.{alias[3]}"
        if shared in found and not torch.equal(found[shared], found[name]):
            raise CheckpointError(f"{shared} and {name} differ, but config.json ties the heads")
        found.setdefault(shared, found.pop(name))
    return found

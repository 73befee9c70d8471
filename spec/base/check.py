"""What keeps a folder from being a base, from its config and the headers of its weights: nothing large is read."""

import copy
import importlib.util
import inspect
import json
import logging
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import logging as transformers_logging
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.quantizers.auto import get_hf_quantizer

from spec.base.folder import BaseError, one_line, refusals, weight_files

log = logging.getLogger(__name__)

_META = torch.device("meta")
_OTHER_TASKS = re.compile(r".*(Classification|QuestionAnswering|MultipleChoice|MaskedLM|RewardModel\w*)")
"""Classes of models that have something else in the place of an output matrix."""

_LIBRARIES = {"gptq": "optimum gptqmodel", "awq": "gptqmodel", "quark": "amd-quark"}
_LIBRARIES |= {name: name for name in ("bitsandbytes", "compressed-tensors", "torchao", "hqq")}
"""What reads weights of a quantisation, where transformers' own message does not say it in full."""


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's configuration; a BaseError says that it cannot be read, is no language model's, or asks for libraries
    that are not installed."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        values = json.loads((folder / "config.json").read_text())
        kind, code = values.get("model_type"), values.get("auto_map", {})
    except (OSError, ValueError, AttributeError) as error:
        raise BaseError(f"{folder}: config.json cannot be read ({one_line(error)}); copy it again") from None
    if not trust_remote_code and kind not in CONFIG_MAPPING:
        if code:
            raise BaseError(
                f"{folder}: its architecture {kind!r} is code of its own: set model.trust_remote_code to true "
                "(--trust-remote-code), if you trust whoever wrote it"
            )
        if not kind:
            raise BaseError(f"{folder}: config.json names no architecture (model_type); copy it from the model")
        raise BaseError(
            f"{folder}: transformers {transformers.__version__} does not know the architecture {kind!r}; install a "
            "version that does (pip install --upgrade transformers), or use another base"
        )
    with refusals(folder, "its config.json does not fit its architecture"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", True) is None:
        del config.quantization_config
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or auto_class(config) is AutoModelForImageTextToText
    other = [name for name in values.get("architectures") or () if _OTHER_TASKS.fullmatch(name)]
    if other or config.is_encoder_decoder or not (known or (trust_remote_code and "AutoModelForCausalLM" in code)):
        raise BaseError(
            f"{folder}: {other[0] if other else repr(kind)} is no language model that writes text from left to right; "
            "use another base"
        )
    if (folder / "modules.json").is_file():
        raise BaseError(
            f"{folder}: modules.json makes it a model of embeddings (sentence-transformers); use another base"
        )
    _check_quantisation(folder, config)
    return config


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model: a few language models come within a model of images."""
    images = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if images else AutoModelForCausalLM


def skeleton(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model without its weights, on the meta device; an attention that is not installed is replaced by PyTorch's. A
    BaseError says that its config makes no model that writes with a memory of its past, by an output matrix."""
    config = read_config(folder, trust_remote_code)
    with refusals(folder, "its config.json makes no model"):
        try:
            model = _build(config, trust_remote_code)
        except (ImportError, ValueError):
            asked = str(config._attn_implementation_internal)
            if "flash" not in asked:
                raise
            _say_replaced(folder, asked)
            config._attn_implementation = "sdpa"
            model = _build(config, trust_remote_code)
    names, name = inspect.signature(model.forward).parameters.keys(), type(model).__name__
    own = type(model).__module__.startswith("transformers.")  # code from elsewhere may take its cache as it likes
    if own and not {"past_key_values", "cache_params"} & names:
        raise BaseError(f"{folder}: {name} has no cache of a kind that is known here; use another base")
    if not isinstance(getattr(model.get_output_embeddings(), "weight", None), torch.Tensor):
        raise BaseError(f"{folder}: {name} has no output matrix (lm_head); use another base")
    return model


@cache
def _say_replaced(folder: Path, attention: str) -> None:
    log.warning("%s: config.json asks for %s, which is not here; using PyTorch's own attention", folder, attention)


def _build(config: Any, trust_remote_code: bool) -> Any:
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):  # the names and shapes are those of the model before it was quantised
        del plain.quantization_config
    with _META:
        return auto_class(config).from_config(plain, trust_remote_code=trust_remote_code).eval()


def _check_quantisation(folder: Path, config: Any) -> None:
    """Whether the libraries that read quantised weights are here."""
    if not hasattr(config, "quantization_config"):
        return
    found = config.quantization_config
    method = str(found.get("quant_method") if isinstance(found, dict) else found.quant_method)
    try:
        quantiser, *_ = get_hf_quantizer(copy.deepcopy(config), None, {"": "cpu"}, True, {})
    except Exception as error:
        library = _LIBRARIES.get(method)
        remedy = f"pip install {library}" if library else "see its message for what to install"
        raise BaseError(
            f"{folder}: its weights are quantised ({method}), and the library that reads them cannot be used: "
            f"{one_line(error)}. Do as it says ({remedy}), or use the model's unquantised weights"
        ) from error
    if quantiser is None:
        raise BaseError(
            f"{folder}: its weights are quantised in a way that transformers {transformers.__version__} does not know "
            f"({method}); use the model's unquantised weights"
        )


def check_weights(folder: Path, model: Any) -> list[str]:
    """Compare names and shapes in the weight files with those of skeleton's model, as transformers' loading does.

    Returns what the user should know, a sentence each. A BaseError says that a file is damaged, or that weights are
    missing, of another shape, or of more than the model.
    """
    notes = []
    if (folder / "adapter_config.json").is_file():
        if importlib.util.find_spec("peft") is not None:
            raise BaseError(
                f"{folder} holds whole weights and adapter_config.json: peft, which is installed, would add the "
                "adapter to them. Move adapter_config.json away if it is merged into the weights; else merge it first"
            )
        notes.append("an adapter lies next to the weights, and is not read; to use it, merge it into them")
    headers = {name: header for path in weight_files(folder) for name, header in _read_header(path).items()}
    if json.loads((folder / "config.json").read_text()).get("quantization_config"):
        return notes
    options = LoadStateDictConfig(
        device_map={"": _META},
        dtype=torch.bfloat16,
        weight_mapping=get_model_conversion_mapping(model, None, None),
        ignore_mismatched_sizes=True,
    )
    with refusals(folder, "its weights do not fit its config.json"):
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device=_META) for name, (shape, _) in headers.items()}
        report, _ = model._load_pretrained_model(model, tensors, None, options)
        model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(report)
    check_report(folder, report.missing_keys, report.mismatched_keys, report.unexpected_keys)
    whole = next((name for name, (_, whole) in headers.items() if whole and name.endswith(".weight")), None)
    if whole is not None:
        raise BaseError(
            f"{folder}: {whole} holds integers, and config.json has no quantization_config that says what they "
            "stand for; use the model's unquantised weights, or copy its config.json"
        )
    lost = _lost(model, report.unexpected_keys)
    if lost:
        raise BaseError(
            f"{folder}: the weights have {_named(lost)}, for which the model of config.json has no place: config.json "
            "and the weights are not of the same model; copy the config.json that was saved with the weights"
        )
    if report.unexpected_keys:
        notes.append(f"the weights have {_named(report.unexpected_keys)} beyond the language model, which are not read")
    return notes


def _lost(model: Any, unexpected: Collection[str]) -> list[str]:
    """Tensors of layers that the model does not have, and those next to a matrix that it has: biases, scales."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    any_layer = {re.sub(r"\d+", "0", name) for name in names}
    if getattr(model.config.get_text_config(), "num_nextn_predict_layers", None):  # these layers draft
        any_layer = set()
    modules = {name.removesuffix("weight") for name in names if name.endswith(".weight")}
    prefixes = {name: [name[: place.end()] for place in re.finditer(r"\.", name)] for name in unexpected}
    return [
        name for name in unexpected if re.sub(r"\d+", "0", name) in any_layer or not modules.isdisjoint(prefixes[name])
    ]


def check_report(folder: Path, missing: Any, mismatched: Any, unexpected: Collection[str] = ()) -> None:
    """Refuse weights of which transformers reports that some are missing or have another shape."""
    if mismatched:
        name, found, expected = min(mismatched, key=lambda each: ("embed" not in each[0], each[0]))
        raise BaseError(
            f"{folder}: {name} is {list(found)} in the weights, but config.json gives {list(expected)} "
            f"({len(mismatched)} in all): config.json and the weights are not of the same model, or one of them "
            "is from before the vocabulary was resized; copy the config.json that was saved with the weights"
        )
    if missing:
        instead = f", and have {_named(unexpected)} that config.json's model does not have" if unexpected else ""
        tied = "; or set tie_word_embeddings to true in config.json if the input table is the output matrix, too"
        raise BaseError(
            f"{folder}: the weights lack {_named(missing)}{instead}; copy every weight file of the model"
            + (tied if set(missing) == {"lm_head.weight"} else "")
        )


def _named(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (", .." if len(names) > 5 else "") + f" ({len(names)} in all)"


def _read_header(path: Path) -> dict[str, tuple[list[int], bool]]:
    """The shape of each tensor by name, and whether it holds whole numbers."""
    with path.open("rb") as file:
        if file.read(20).startswith(b"version https://git-"):
            raise BaseError(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull` there")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                return {name: (part.get_shape(), part.get_dtype()[0] in "IU") for name, part in parts.items()}
        except (SafetensorError, OSError) as error:
            raise BaseError(f"{path} is damaged or incomplete ({one_line(error)}); copy it again") from None
    try:
        tensors = torch.load(path, map_location="meta", weights_only=True)
        return {name: (list(tensor.shape), not tensor.is_floating_point()) for name, tensor in tensors.items()}
    except Exception as error:
        raise BaseError(
            f"{path} is damaged, or holds more than named tensors: pickled code is not run, since it could do anything "
            f"({one_line(error)[:120]}). If you trust it, load it and save the model as safetensors (save_pretrained)"
        ) from None

"""What keeps a folder from being a base, from its config and the headers of its weights: nothing large is read."""

from __future__ import annotations

import copy
import inspect
import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import logging as transformers_logging
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers.auto import get_hf_quantizer

from spec.base.folder import BaseError, one_line, refusals, weight_files
from spec.base.tokenizer import check_tokenizer, load_tokenizer

log = logging.getLogger(__name__)

_META = torch.device("meta")
_LIBRARIES = {
    "gptq": "optimum gptqmodel",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "torchao": "torchao",
    "hqq": "hqq",
    "quark": "amd-quark",
}
"""What reads weights of a quantisation, where transformers' own message does not say it in full."""


def check(folder: Path, trust_remote_code: bool = False) -> None:
    """Refuse a folder whose model cannot be loaded.

    Raises:
        BaseError: says what is wrong and what to do.
    """
    model = skeleton(folder, read_config(folder, trust_remote_code), trust_remote_code)
    check_weights(folder, model)
    check_tokenizer(folder, load_tokenizer(folder, trust_remote_code), model.get_input_embeddings().weight.shape[0])


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's configuration; an attention that is not installed is replaced by PyTorch's own.

    Raises:
        BaseError: it cannot be read, is no language model's, or asks for libraries that are not installed.
    """
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
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not (trust_remote_code and "AutoModelForCausalLM" in code):
        raise BaseError(
            f"{folder}: {kind!r} is no language model that writes text from left to right; use another base"
        )
    _check_quantisation(folder, config)
    return config


def skeleton(folder: Path, config: Any, trust_remote_code: bool = False) -> Any:
    """The model without its weights, on the meta device.

    Where config.json asks for an attention that is not installed, `config` is changed to PyTorch's own.
    """
    asked = config._attn_implementation_internal
    try:
        return _checked(folder, _build(config, trust_remote_code))
    except BaseError:
        raise
    except (ImportError, ValueError) as error:
        if not asked or "flash" not in str(asked):
            raise BaseError(f"{folder}: its model cannot be built ({one_line(error)})") from error
    except Exception as error:
        raise BaseError(
            f"{folder}: its config.json makes no model ({type(error).__name__}: {one_line(error)})"
        ) from error
    _say_replaced(folder, str(asked))
    with refusals(folder, "its model cannot be built"):
        config._attn_implementation = "sdpa"
        return _checked(folder, _build(config, trust_remote_code))


def _checked(folder: Path, model: Any) -> Any:
    """A model that writes with a memory of its past, by an output matrix."""
    names = inspect.signature(model.forward).parameters.keys()
    own = type(model).__module__.startswith("transformers.")  # code from elsewhere may take its cache as it likes
    if own and not {"past_key_values", "cache_params"} & names:
        raise BaseError(
            f"{folder}: {type(model).__name__} keeps no memory of what it has read, or in a form that is not known "
            "here; use another base"
        )
    if not isinstance(getattr(model.get_output_embeddings(), "weight", None), torch.Tensor):
        raise BaseError(f"{folder}: {type(model).__name__} has no output matrix (lm_head); use another base")
    return model


@cache
def _say_replaced(folder: Path, attention: str) -> None:
    log.warning("%s: config.json asks for %s, which is not here; using PyTorch's own attention", folder, attention)


def _build(config: Any, trust_remote_code: bool) -> Any:
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):  # the names and shapes are those of the model before it was quantised
        del plain.quantization_config
    with _META:
        return AutoModelForCausalLM.from_config(plain, trust_remote_code=trust_remote_code).eval()


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
            f"{folder}: its weights are quantised ({method}), and what reads them is not here or does not run here: "
            f"{one_line(error)}. Do as it says ({remedy}), or use the model's weights that are not quantised"
        ) from error
    if quantiser is None:
        raise BaseError(
            f"{folder}: its weights are quantised in a way that transformers {transformers.__version__} does not know "
            f"({method}); use the model's weights that are not quantised"
        )


def check_weights(folder: Path, model: Any) -> None:
    """Compare names and shapes in the weight files with the model's, as transformers' own loading does.

    Args:
        folder: of the weights.
        model: as skeleton builds it.

    Raises:
        BaseError: a damaged file, weights that are missing or of another shape.
    """
    headers = {name: shape for path in weight_files(folder) for name, shape in _read_header(path).items()}
    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" in config or not headers:
        return
    options = LoadStateDictConfig(
        device_map={"": _META},
        dtype=torch.bfloat16,
        weight_mapping=get_model_conversion_mapping(model, None, None),
        ignore_mismatched_sizes=True,
    )
    with refusals(folder, "its weights do not fit its config.json"):
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device=_META) for name, shape in headers.items()}
        report, _ = model._load_pretrained_model(model, tensors, None, options)
        model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(report)
    check_report(folder, report.missing_keys, report.mismatched_keys)


def check_report(folder: Path, missing: Any, mismatched: Any) -> None:
    """Refuse weights of which transformers reports that some are missing or have another shape."""
    if mismatched:
        name, found, expected = min(mismatched, key=lambda each: ("embed" not in each[0], each[0]))
        raise BaseError(
            f"{folder}: {name} is {list(found)} in the weights where config.json gives {list(expected)} "
            f"({len(mismatched)} such in all): config.json and the weights are not of the same model, or one of them "
            "is from before the vocabulary was resized; copy the config.json that was saved with the weights"
        )
    if missing:
        named = ", ".join(sorted(missing)[:5]) + (", .." if len(missing) > 5 else "")
        raise BaseError(
            f"{folder}: the weights lack {named} ({len(missing)} in all); copy every weight file of the model"
        )


def _read_header(path: Path) -> dict[str, list[int]]:
    """Shapes by name; empty for weights that a quantised or an older format holds in another way."""
    with path.open("rb") as file:
        if file.read(20).startswith(b"version https://git-"):
            raise BaseError(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull` there")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BaseError(f"{path} is damaged or incomplete ({one_line(error)}); copy it again") from None
    try:
        tensors = torch.load(path, map_location="meta", weights_only=True)
        return {name: list(tensor.shape) for name, tensor in tensors.items()}
    except Exception as error:
        raise BaseError(
            f"{path} holds more than tensors, or is damaged: pickled code is not run, since it could do anything "
            f"({one_line(error)[:120]}); save the model as safetensors (save_pretrained) where you trust it"
        ) from None

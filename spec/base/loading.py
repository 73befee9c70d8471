"""A base that is ready to run, and the tokens that end its answers."""

import contextlib
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from spec.base.check import auto_class, check_report, check_weights, read_config, skeleton
from spec.base.folder import BaseError, add_code, refusals
from spec.base.limits import Limits, limits_of
from spec.base.taps import hidden_states
from spec.base.tokenizer import check_tokenizer, load_tokenizer
from spec.config import Model
from spec.corpus.chat import ChatTemplate
from spec.device import arithmetic, choose_device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """A causal language model ready to run."""

    model: Any  # in the dtype that it computes in, which may be wider than `dtype` (see arithmetic)
    tokenizer: Any
    digest: str  # of the weights, as identify gives it
    device: torch.device
    dtype: torch.dtype  # of its weights as they were asked for, and of its states and tables where they are stored

    @property
    def producer(self) -> dict[str, str]:
        """What computes here, as segments write it down."""
        return producer(self.device, self.model.dtype)

    @property
    def hidden_size(self) -> int:
        """Width d of the vectors that lm_head reads."""
        return int(self.lm_head.shape[1])

    @property
    def vocab_size(self) -> int:
        """Rows V of lm_head (the padded vocabulary, not len(tokenizer))."""
        return int(self.lm_head.shape[0])

    @property
    def lm_head(self) -> torch.Tensor:
        """The output matrix [V, d]."""
        weight: torch.Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def embedding(self) -> torch.Tensor:
        """The input table [>= V, d]."""
        weight: torch.Tensor = self.model.get_input_embeddings().weight
        return weight

    @property
    def tables(self) -> dict[str, torch.Tensor]:
        """Both, [V, d] each, as speculators start from them or borrow them."""
        return {"embedding": self.embedding[: self.vocab_size].detach(), "lm_head": self.lm_head.detach()}

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset().union(*_stops(self.model.generation_config, self.tokenizer))

    @cached_property
    def limits(self) -> Limits:
        """What it can read and remember."""
        return limits_of(self.model)


def load(
    params: Model, folder: Path, digest: str, device: torch.device | None = None, dtype: str | None = None
) -> Base:
    """Load a base for inference, on `device` (default: choose_device()) and in `dtype` (default: that of params).

    `folder` is as resolve gives it, and `digest` as identify does under "weights".
    """
    device = device or choose_device()
    dtype = dtype or params.dtype
    if params.trust_remote_code:
        add_code(folder)
    with refusals(folder, "it could not be loaded"):
        empty = skeleton(folder, params.trust_remote_code)
        check_weights(folder, empty)
        tokenizer = load_tokenizer(folder, params.trust_remote_code)
        check_tokenizer(folder, tokenizer, empty.get_input_embeddings().weight.shape[0])
        model = _load_model(folder, params.trust_remote_code, device, dtype, empty.config._attn_implementation)
        base = Base(model, tokenizer, digest, device, getattr(torch, dtype))
        _check_states(folder, base)
    return base


def _load_model(folder: Path, trust_remote_code: bool, device: torch.device, dtype: str, attention: str) -> Any:
    config = read_config(folder, trust_remote_code)
    if config._attn_implementation_internal:  # asked for by config.json, and perhaps not installed
        config._attn_implementation = attention
    quantised = hasattr(config, "quantization_config")
    asked, computed = getattr(torch, dtype), arithmetic(dtype, device)
    model, report = auto_class(config).from_pretrained(
        folder,
        config=config,
        dtype=asked,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        **({"device_map": {"": device}} if quantised else {}),
    )
    check_report(folder, report["missing_keys"], report["mismatched_keys"])
    model = model.eval().requires_grad_(False)
    if hasattr(model.config, "quantization_config"):  # it is where it shall be, in formats of its own
        return model
    if quantised:  # transformers widened the weights, perhaps to another dtype
        for parameter in model.parameters():
            parameter.data = parameter.data.to(asked)
    if computed != asked:
        log.warning("this CPU has no instructions for %s: the base computes in float32", dtype)
        model = model.to(computed)
    return model.to(device)


@torch.inference_mode()
def _check_states(folder: Path, base: Base) -> None:
    """Check that lm_head reads exactly what hidden_states returns, and no token what comes after it."""
    read: list[torch.Tensor] = []
    hook = base.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=base.device) % base.vocab_size
    try:
        base.model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    states, name = hidden_states(base.model, ids), type(base.model).__name__
    if not states.isfinite().all():
        raise BaseError(
            f"{folder}: its states of the ids 0 to 4 are not finite: the weights hold NaN, or numbers that are too "
            f"large for {str(base.model.dtype).removeprefix('torch.')} (set model.dtype to bfloat16 or float32)"
        )
    if not read or not torch.equal(read[0], states):
        what = f"lm_head of {name} does not read the model's last hidden state"
        raise BaseError(f"{folder}: {what}, so these heads cannot be trained for it")
    one, other = states[:, :3].float()
    if (one - other).abs().max() > 0.1 * one.abs().max():  # rounding is far less
        raise BaseError(f"{folder}: {name} lets tokens see those that come after them; use another base")


def producer(device: torch.device, computed: torch.dtype) -> dict[str, str]:
    """What computed something, as segments write it down: versions, the kind of device and its arithmetic."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "arithmetic": str(computed).removeprefix("torch."),
    }


def stop_ids(folder: Path, trust_remote_code: bool = False) -> frozenset[int]:
    """Base.stop_ids of the model in a folder, without its weights."""
    return frozenset().union(*_stops(*_without_weights(folder, trust_remote_code)))


def unstopped_turn(folder: Path, trust_remote_code: bool = False) -> int | None:
    """The token that closes a turn of the chat template where the base does not name it as one that ends an answer."""
    named, turn = _stops(*_without_weights(folder, trust_remote_code))
    return next(iter(turn - named), None)


def _without_weights(folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """The generation config and the tokenizer."""
    with refusals(folder, "its generation_config.json cannot be read"):
        if (folder / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(folder)
        else:
            generation = GenerationConfig.from_model_config(read_config(folder, trust_remote_code))
    return generation, load_tokenizer(folder, trust_remote_code)


def _stops(generation: Any, tokenizer: Any) -> tuple[set[int], set[int]]:
    """The tokens that the base names as ends of an answer, and the one that closes a turn of the chat template."""
    named: set[int] = set()
    for value in (generation.eos_token_id, tokenizer.eos_token_id):
        named.update(each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))
    token = None
    if getattr(tokenizer, "chat_template", None):
        with contextlib.suppress(Exception):  # a template is a program; what it refuses is said where data are read
            token = ChatTemplate(tokenizer).end_of_turn
    turn = None if token is None else tokenizer.convert_tokens_to_ids(token)
    return named, set() if turn is None or turn == tokenizer.unk_token_id else {int(turn)}

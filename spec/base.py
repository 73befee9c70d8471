"""The base model: where it is, what identifies it, its hidden states, its own answers."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import logging as transformers_logging

from spec import files
from spec.config import Model
from spec.device import arithmetic, choose_device
from spec.errors import SpecError
from spec.kv_cache import make_cache

log = logging.getLogger(__name__)

BUCKET = 64
"""Sequences are padded to a multiple of this: a bf16 result depends on the padded length, so it must follow from
the sequence alone and never from what shares its batch."""

LEAST_ROWS = 8
"""A batch that writes has at least so many rows, idle ones if need be: on a CPU bf16 results are the same, bit for
bit, for all batch sizes from a few rows on, but a single row is multiplied by other code."""

LOOKED_AT = 128
"""Tokens of a sequence by which has_linear_logits judges."""

COMPACT = 0.75
"""Ended rows are taken out of a batch when at most this share of it still writes."""

_WEIGHTS = (".safetensors", ".bin")
_TOKENIZER = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|spiece|sentencepiece|tekken).*"
    r"|.*\.(model|tiktoken|jinja|bpe|spm)"
)
"""Names of the files that a tokenizer reads; what lies in the folder chat_templates belongs to them."""

_DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.spm", "*.bpe"]


class BaseError(SpecError):
    """A base model that cannot be used: says which, what was found and what would fit."""


def bucket(length: int) -> int:
    """The padded length of a sequence of `length` tokens."""
    return -(-length // BUCKET) * BUCKET


def prompt_bucket(length: int) -> int:
    """The padded length of a prompt to be answered: a power of two, so that rare long prompts share a batch.

    A batch costs nearly the same for few rows as for many while it writes, and padding costs only its prefill.
    """
    return max(BUCKET, 1 << (length - 1).bit_length())


def find_folder(name: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder that a local path or a hub id names; the files of a hub id are downloaded when they are not here yet.

    Args:
        name: a path or `owner/name`.
        patterns: names of the files to download.
        revision: of a hub id.

    Raises:
        BaseError: a name that is neither a folder nor on the hub.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise BaseError(f"no folder {name!r}; give a folder or a hub id such as owner/name")
    from huggingface_hub import snapshot_download  # only where a hub is used

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        raise BaseError(f"{name!r} is no local folder and could not be downloaded ({error})") from None


def resolve(name: str, revision: str | None) -> Path:
    """The folder of a model named by a local path or a hub id; a hub model is downloaded when it is not here yet.

    Raises:
        BaseError: a folder without config or weights; a name that is neither a folder nor on the hub.
    """
    folder = find_folder(name, _DOWNLOADED, revision)
    if not (folder / "config.json").is_file():
        raise BaseError(f"{folder}: no config.json; this is not a model folder")
    if not _weight_files(folder):
        raise BaseError(f"{folder}: no weights (*.safetensors or *.bin); copy them beside config.json")
    return folder


def downloaded_revision(folder: Path, params: Model) -> str | None:
    """The commit that a hub model's folder holds (hub caches name folders by it); None for a local folder."""
    return None if Path(params.partial_pretrain).is_dir() else folder.name


def identify(folder: Path) -> dict[str, Any]:
    """Digests of what a base's output depends on.

    - weights: weight files, config.json and code of the folder's own (which runs where it is trusted).
    - tokenizer: the tokenizer's files and its chat template.
    - generation: generation_config.json, whose stop tokens end answers; states do not depend on it.
    """
    entries = sorted(p for p in folder.iterdir() if p.is_file())
    parts = {
        "weights": [folder / "config.json", *_weight_files(folder), *(p for p in entries if p.suffix == ".py")],
        "tokenizer": [
            *(p for p in entries if _TOKENIZER.fullmatch(p.name)),
            *sorted(p for p in folder.glob("chat_templates/**/*") if p.is_file()),
        ],
        "generation": [p for p in entries if p.name == "generation_config.json"],
    }
    digests = files.digest_files([path for paths in parts.values() for path in paths])
    return {
        part: files.digest_json({p.relative_to(folder).as_posix(): digests[str(p)] for p in paths})
        for part, paths in parts.items()
    }


def producer(device: torch.device, computed: torch.dtype) -> dict[str, str]:
    """What computed something, as segments write it down: versions, the kind of device and its arithmetic."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "arithmetic": str(computed).removeprefix("torch."),
    }


def _weight_files(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix in _WEIGHTS and p.is_file())
    safe = [p for p in found if p.suffix == ".safetensors"]
    return safe or found


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder."""
    if not trust_remote_code and not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        raise BaseError(f"{folder}: no tokenizer (tokenizer.json or its like); copy it beside config.json")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise BaseError(f"{folder}: no tokenizer could be loaded ({error})") from None


def stop_ids(folder: Path, trust_remote_code: bool = False) -> frozenset[int]:
    """Base.stop_ids of the model in a folder, without its weights."""
    try:
        generation = GenerationConfig.from_pretrained(folder)
    except OSError:  # there is none; a model takes its own from config.json then
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        generation = GenerationConfig.from_model_config(config)
    return _stop_ids(generation, load_tokenizer(folder, trust_remote_code))


def _stop_ids(generation: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for value in (generation.eos_token_id, tokenizer.eos_token_id):
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found)


@dataclass(frozen=True)
class Base:
    """A causal language model ready to run.

    Attributes:
        model: in the dtype that it computes in, which may be wider than `dtype` (see arithmetic).
        tokenizer: of its folder.
        digest: identify's weights digest.
        device: where it is.
        dtype: of its weights as they were asked for, and of its states and tables where they are stored.
    """

    model: Any
    tokenizer: Any
    digest: str
    device: torch.device
    dtype: torch.dtype

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
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return _stop_ids(self.model.generation_config, self.tokenizer)


def load(
    params: Model, folder: Path, digest: str, device: torch.device | None = None, dtype: str | None = None
) -> Base:
    """Load a base for inference.

    Args:
        params: dtype and trust_remote_code are read.
        folder: as resolve gives it.
        digest: as identify gives it under "weights".
        device: default choose_device().
        dtype: instead of params.dtype.

    Raises:
        BaseError: weights that do not load.
    """
    device = device or choose_device()
    dtype = dtype or params.dtype
    computed = arithmetic(dtype, device)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            trust_remote_code=params.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BaseError(f"{folder}: the weights could not be loaded ({error})") from None
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:5])
        raise BaseError(f"{folder}: the weights lack {missing}; copy every weight file of the model")
    model = model.to(device).eval().requires_grad_(False)
    if computed != getattr(torch, dtype):
        log.warning("this CPU has no instructions for %s: the base computes in float32", dtype)
        model = model.to(computed)
    base = Base(model, load_tokenizer(folder, params.trust_remote_code), digest, device, getattr(torch, dtype))
    _check_states(base)
    return base


@torch.inference_mode()
def _check_states(base: Base) -> None:
    """lm_head must read exactly what hidden_states returns, else every head would learn from the wrong vector."""
    read: list[torch.Tensor] = []
    hook = base.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))
    ids = torch.arange(4, device=base.device)[None] % base.vocab_size
    try:
        base.model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    if not read or not torch.equal(read[0], hidden_states(base.model, ids)):
        raise BaseError(
            f"{type(base.model).__name__}: lm_head does not read the model's last hidden state, "
            "so these heads cannot be trained for it"
        )


@torch.inference_mode()
def has_linear_logits(base: Base, rows: Sequence[NDArray[np.int32]]) -> bool:
    """Whether the base's logits are lm_head times the state, and nothing more (a bias, a scale, a cap).

    Every logit must be the float32 product but for the rounding of the dtype that the base computes in.

    Args:
        base: the model.
        rows: ids [T] of real sequences; the first few are read, as far as LOOKED_AT tokens.
    """
    rounding = max(torch.finfo(base.model.dtype).eps, 2e-5)
    if not rows:
        raise BaseError("there is no sequence by which to judge whether lm_head makes the base's logits")
    for row in rows[:4]:
        ids = torch.from_numpy(row[:LOOKED_AT].astype(np.int64)).to(base.device)[None]
        logits = base.model(input_ids=ids, use_cache=False).logits[0].float()
        states = hidden_states(base.model, ids)[0].float()
        # A part of the matrix at a time: all of it in float32 takes gigabytes of a large base's card.
        found = torch.cat([states @ part.float().T for part in torch.split(base.lm_head, 8192)], -1)
        allowed = rounding * (logits.abs() + logits.square().mean().sqrt())
        if bool(((logits - found).abs() > allowed).any()):
            return False
    return True


def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """States after the final norm, [B, S, d], of right-padded ids [B, S].

    Attention is causal, so that padding on the right changes no state of a real token.
    """
    states: torch.Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return states


@torch.inference_mode()
def answer(
    base: Base,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    on_token: Callable[[int], object] = lambda count: None,
) -> list[list[int]]:
    """Let the base continue each prompt until a stop token (kept) or max_new_tokens.

    Prompts are padded on the left to a common bucketed length; give prompts of one bucket together, so that an
    answer does not depend on its company. Finished rows leave the batch.

    Args:
        base: the model.
        prompts: token ids, none empty.
        max_new_tokens: at most this many tokens each.
        temperature: 0 is greedy; else softmax sampling.
        seeds: of the sampling, one a prompt, so that an answer follows from its prompt and seed alone.
        on_token: called with the number of tokens written at each step.
    """
    width = prompt_bucket(max(map(len, prompts)))
    device, rows = base.device, len(prompts)
    prompts = [*prompts, *[prompts[0]] * (LEAST_ROWS - rows)]
    pad = base.tokenizer.pad_token_id or 0
    padded = np.full((len(prompts), width), pad)
    real = np.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, width - len(prompt) :] = prompt
        real[row, width - len(prompt) :] = 1
    ids, mask = (torch.from_numpy(array).to(device) for array in (padded, real))
    drawn = _uniform(seeds or [], len(prompts), max_new_tokens if temperature else 0).to(device)
    cache = make_cache(base.model.config)
    answers: list[list[int]] = [[] for _ in range(rows)]
    stops = base.stop_ids
    # The row that each place of the batch writes; -1 once it has ended.
    active = [*range(rows), *[-1] * (len(prompts) - rows)]
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    with_positions = "position_ids" in inspect.signature(base.model.forward).parameters
    for step in range(max_new_tokens):
        logits = base.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **({"position_ids": positions} if with_positions else {}),
        ).logits[:, -1]
        if temperature:
            cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
            tokens = torch.searchsorted(cumulative, drawn[:, step, None] * cumulative[:, -1:])[:, 0]
        else:
            tokens = logits.max(-1).indices  # four times as fast as argmax in bf16 on a CPU
        on_token(sum(row >= 0 for row in active))
        for place, token in enumerate(tokens.tolist()):
            if active[place] >= 0:
                answers[active[place]].append(token)
                if token in stops:
                    active[place] = -1
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        going = [place for place, row in enumerate(active) if row >= 0]
        if not going:
            break
        if (
            LEAST_ROWS <= len(going) <= COMPACT * len(active)
        ):  # a smaller batch is faster, but to make it copies the cache
            keep = torch.tensor(going, device=device)
            active = [active[place] for place in going]
            ids, positions, mask, drawn = ids[keep], positions[keep], mask[keep], drawn[keep]
            cache.batch_select_indices(keep)
    return answers


def _uniform(seeds: Sequence[int], rows: int, length: int) -> torch.Tensor:
    """Uniform numbers in (0, 1], [rows, length]: a row's follow from its seed alone; rows without a seed are idle."""
    drawn = np.ones((rows, length), np.float32)
    for row, seed in enumerate(seeds):
        drawn[row] = 1 - np.random.default_rng(seed).random(length)  # a token of probability 0 is never met
    return torch.from_numpy(drawn)

"""params.yaml as one typed, validated, immutable object; the only module that reads it.

Keys that a file leaves out take the guide's defaults, which are the defaults below. The repository's own
params.yaml lists every key with the values that won on the embedded default.
"""

from __future__ import annotations

import datetime
import functools
import logging
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from spec.errors import SpecError
from spec.heads.config import Params
from spec.heads.registry import METHODS, method, unused_keys
from spec.section import DATE, Positive, Section, explain, listed, parse_dims

_say_once = functools.cache(logging.getLogger(__name__).info)


class ConfigError(SpecError):
    """Parameters that cannot be used: says which key, what was found and what would fit."""


def _expand(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))  # noqa: PTH111 - keeps hub ids and URLs untouched


def _day(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return datetime.date.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a date; write it as 2026-01-31") from None


Dtype = Literal["bfloat16", "float32", "float16"]
DraftSource = Literal["head", "ngram", "lookup", "hybrid"]

Place = Annotated[str, AfterValidator(_expand)]
Paths = Annotated[
    tuple[Annotated[str, Field(min_length=1), AfterValidator(_expand)], ...],
    BeforeValidator(lambda value: () if value is None else listed(value)),
]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Data(Section):
    """Where the text is, and how much of it makes a batch (batch sizes count sequences)."""

    train_files: Paths = ("data/prompts/train.parquet",)
    val_files: Paths = ("data/prompts/val.parquet",)
    eval_files: Paths = ("data/prompts/eval.parquet",)
    prompt_key: str | None = None
    response_key: str | None = None
    ignore_columns: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    skip_bad_rows: bool = False
    max_length: Annotated[int, Field(ge=4)] = 1024
    date: Annotated[datetime.date | None, BeforeValidator(_day)] = DATE
    max_samples: Positive | None = None
    train_batch_size: Positive = 32
    micro_batch_size_per_gpu: Positive = 4

    def files(self, split: str) -> tuple[str, ...]:
        """The files or folders of a split ("train", "val" or "eval")."""
        return {"train": self.train_files, "val": self.val_files, "eval": self.eval_files}[split]


def _of_method(value: object) -> object:
    """The section of a file as its method's parameters; keys that other methods alone have are left out."""
    values = {} if value is None else value
    if not isinstance(values, Mapping):
        return value
    name = values.get("method", "sum_rnn")
    others = unused_keys(name)
    ignored = [f"{key}={values[key]}" for key in sorted(others.keys() & values.keys()) if values[key] != others[key]]
    if ignored:
        _say_once(f"model.speculator: method {name} ignores {', '.join(ignored)}")
    own = {key: each for key, each in values.items() if key not in others}
    return method(name).Params.model_validate({"method": name, **own})


class Model(Section):
    """The base model, and how it is trained with the speculator."""

    partial_pretrain: Place = "models/base"
    revision: str | None = None
    dtype: Dtype = "bfloat16"
    trust_remote_code: bool = False
    freeze_base_model: bool = True
    speculator_loss_coeff: NonNegative = 1.0
    speculator: Annotated[SerializeAsAny[Params], BeforeValidator(_of_method)] = Field(
        default_factory=lambda: method("sum_rnn").Params(method="sum_rnn")
    )


class Respond(Section):
    """Who writes the answers, and how."""

    source: Literal["base", "data"] = "base"
    engine: Literal["transformers", "vllm"] = "transformers"
    max_new_tokens: Positive = 256
    temperature: NonNegative = 0.0
    batch_size: Positive = 64
    seed: Seed = 0


class Features(Section):
    """The cache of hidden states."""

    store: Place | None = None
    codec: Literal["none", "zstd", "fp8"] = "zstd"
    layer_codec: Literal["none", "zstd", "fp8"] = "zstd"
    segment_tokens: Positive = 65536

    @field_validator("store")
    @classmethod
    def _folder(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise ValueError(
                f"{value!r} is not a folder, but the store must be one. Name a folder or null, and copy with "
                f"`spec store pull {value}` before a run and `spec store push {value}` after or during it"
            )
        return value


class Optim(Section):
    """Loss, optimizer and schedule."""

    lr: Rate = 1e-4
    base_lr: Rate = 1e-5
    loss: Literal["ce", "kl"] = "ce"
    head_weights: Annotated[tuple[Rate, ...] | None, BeforeValidator(listed)] = None
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(listed)] = (0.9, 0.95)
    weight_decay: NonNegative = 0.01
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup_ratio: Fraction = 0.05
    clip_grad: Rate = 1.0


class Trainer(Section):
    """The run: workers, length, checkpoints, logging."""

    launcher: Annotated[
        tuple[str, ...],
        BeforeValidator(lambda value: tuple(shlex.split(value)) if isinstance(value, str) else value),
        PlainSerializer(shlex.join),
    ] = ("torchrun", "--standalone", "--nproc-per-node=1")
    total_epochs: Positive = 1
    save_freq: Positive = 1000
    test_freq: Positive = 500
    early_stop: Positive | None = None
    logger: Annotated[tuple[Literal["console", "mlflow"], ...], BeforeValidator(listed)] = ("console", "mlflow")
    seed: Seed = 0
    experiment_name: str = "speculator"
    tracking_uri: str | None = None


class Decode(Section):
    """Where drafts come from when text is generated."""

    draft: DraftSource = "hybrid"
    ngram_min: Positive = 1
    ngram_max: Positive = 8
    draft_len: Positive | None = None
    lookup_mb: NonNegative = 64.0
    token_cost: Rate = 0.03

    @model_validator(mode="after")
    def _ordered(self) -> Decode:
        if self.ngram_min > self.ngram_max:
            raise ValueError(f"ngram_min {self.ngram_min} is above ngram_max {self.ngram_max}")
        if self.draft == "lookup" and not self.lookup_mb:
            raise ValueError("draft is lookup, and lookup_mb is 0: without an index there is nothing to look up")
        return self


class Evaluate(Section):
    """How much is measured with the real decoding loop."""

    max_prompts: Positive = 16
    max_new_tokens: Positive = 128


class Config(Section):
    """Every parameter of a run."""

    data: Data = Data()
    model: Model = Model()
    respond: Respond = Respond()
    features: Features = Features()
    optim: Optim = Optim()
    trainer: Trainer = Trainer()
    decode: Decode = Decode()
    evaluate: Evaluate = Evaluate()

    @property
    def base_answers(self) -> bool:
        """Whether the base writes the answers; in joint training it learns the data's own."""
        return self.respond.source == "base" and self.model.freeze_base_model

    @property
    def reading(self) -> dict[str, Any]:
        """How the corpus package is to read the columns of data files: arguments of its functions, by name."""
        keys = ("prompt_key", "response_key", "ignore_columns")
        return {**{key: getattr(self.data, key) for key in keys}, "need_answers": not self.base_answers}

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        weights, speculator = self.optim.head_weights, self.model.speculator
        n, longest = speculator.n_predict, speculator.longest_draft
        if weights is not None and len(weights) != n:
            raise ValueError(f"optim.head_weights has {len(weights)} numbers and model.speculator.n_predict is {n}")
        length = self.decode.draft_len
        if self.decode.draft == "head" and length is not None and longest is not None and length > longest:
            raise ValueError(
                f"decode.draft_len is {length}, and the heads of model.speculator draft at most {longest} tokens at a "
                "step (draft=head)"
            )
        if not self.model.freeze_base_model and not method(speculator.method).joint:
            raise ValueError(
                f"method {speculator.method} reads whole sequences of a frozen base, and is not trained jointly with "
                "it: set model.freeze_base_model to true, or method to sum_rnn or sum_lstm"
            )
        if not self.model.freeze_base_model and self.optim.loss == "kl":
            raise ValueError("optim.loss=kl distils a frozen base: set model.freeze_base_model to true, or loss to ce")
        return self


def load(path: Path = Path("params.yaml"), overrides: Sequence[str] = ()) -> Config:
    """Read and validate a parameter file in YAML 1.2, the dialect that dvc writes (``5e-05`` is a number), with
    overrides such as ``model.speculator.n_predict=3`` on top; a ConfigError says what is wrong."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such parameter file; run from the project's folder or name one with --params")
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text()) or {}
    except YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, found {type(tree).__name__}")
    return from_mapping(tree, str(path), overrides)


def from_mapping(tree: dict[str, Any], source: str = "parameters", overrides: Sequence[str] = ()) -> Config:
    """Validate nested parameters, with overrides on top; a ConfigError begins with the source."""
    for override in overrides:
        _override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n  ".join([f"{source}:", *explain(error)])) from None


def flatten(config: Config) -> dict[str, object]:
    """Every parameter by its dotted key, as a file has it."""
    return dict(_leaves("", config.model_dump(mode="json")))


def _leaves(prefix: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        yield from _leaves(f"{prefix}{name}.", value) if isinstance(value, dict) else [(f"{prefix}{name}", value)]


def defaults() -> dict[str, object]:
    """The guide's default of every key, those of all built-in methods included, by its dotted key."""
    others = unused_keys(Config().model.speculator.method)
    return flatten(Config()) | {f"model.speculator.{key}": value for key, value in others.items()}


def save(config: Config, path: Path) -> None:
    """Write every parameter to a YAML file that load reads back to an equal Config."""
    with path.open("w") as file:
        YAML().dump(config.model_dump(mode="json"), file)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not key:
        raise ConfigError(f"{override!r} is not an override; write key=value, such as optim.lr=5e-5")
    *sections, name = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ConfigError(f"{override!r}: {section} is a value, not a section")
    fields = (method(each).Params.model_fields.get(name) for each in METHODS)
    if any(getattr(part, "func", None) is parse_dims for field in fields if field for part in field.metadata):
        tree[name] = text.strip("\"'")  # read as a number, 1024.2560 would become 1024.256
        return
    try:
        tree[name] = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        tree[name] = text

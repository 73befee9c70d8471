"""What every method's parameters have, and what a speculator is: one frozen object, kept in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from spec.heads.packed import LAST, Tap
from spec.section import Positive, Section, explain, listed

IGNORED_KEYS = frozenset(
    [
        *("architectures", "model_type", "num_attention_heads", "num_hidden_layers"),
        *("torch_dtype", "dtype", "transformers_version", "_name_or_path"),
    ]
)
"""Keys of config.json that say nothing about the network: readers and tools of the Hugging Face family want them."""


class Params(Section):
    """The keys of model.speculator in params.yaml that all methods have."""

    free: ClassVar[frozenset[str]] = frozenset({"init"})
    """Parameters in which the checkpoint that training starts from may differ; its taps may not."""

    method: str  # a name in the registry
    # The number of heads n. A network may depend on it, so it stays as in training, even where fewer are asked for.
    n_predict: Annotated[int, Field(ge=1, le=32)] = 5
    init: str = "random"  # where training starts: "random", "base", or the folder of a checkpoint
    draft_vocab_size: Positive | None = None  # K, rows of the heads' output; None for the whole vocabulary

    def taps(self, layers: int | None) -> tuple[Tap, ...]:
        """The vectors that such a head reads of a base with this many layers; a ValueError says that the base lacks
        one."""
        return (LAST,)

    @property
    def head_weights(self) -> tuple[float, ...] | None:
        """The weight of each depth's loss where optim.head_weights says nothing; None: all alike."""
        return None

    @property
    def longest_draft(self) -> int | None:
        """How many tokens the heads can draft at a step; None: as many as they are asked for."""
        return self.n_predict

    @property
    def output_matrices(self) -> int:
        """How many matrices make logits; heads that share one share the teacher's logits, too."""
        return 1

    def as_wide_as(self, hidden_size: int) -> Self:
        """These parameters for a base of another width, over its whole vocabulary."""
        return self.model_copy(update={"draft_vocab_size": None})


class Layer(Section):
    """The shape of a base's decoder layers, which a draft layer repeats."""

    heads: Positive  # of the queries
    kv_heads: Positive
    head_dim: Positive
    intermediate_size: Positive
    bias: bool = False  # of queries, keys and values
    eps: float = 1e-5  # of the norms
    rope_theta: float = 10000.0
    positions: Positive = 2048  # that the base was made for

    @classmethod
    def at(cls, width: int) -> Layer:
        """A layer as Llama's first models had it."""
        heads = max(width // 64, 1)
        return cls(heads=heads, kv_heads=heads, head_dim=max(width // heads, 1), intermediate_size=4 * width)


class OnBase(Section):
    """What is known of the base that a speculator belongs to."""

    hidden_size: Positive  # d
    vocab_size: Positive  # V, the rows of its lm_head (padding included; not len(tokenizer))
    layers: Positive | None = None
    base_model_name_or_path: str
    base_digest: str  # identity of its weights; empty where it is not known (a head from elsewhere)
    base_revision: str | None = None


Numbers = Annotated[tuple[float, ...], BeforeValidator(listed)]


class SpeculatorConfig(OnBase, Params):
    """The shape of a speculator and the base that it belongs to; each method has its own class, with its parameters."""

    lookup: str | None = None  # SHA-256 of the index of training answers next to it (spec.lookup)
    mixer: Mapping[str, Numbers] | None = None  # weights of spec.mixer by source, fitted on val

    @model_validator(mode="after")
    def _part_of_the_vocabulary(self) -> Self:
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"draft_vocab_size is {self.draft_vocab_size} and vocab_size {self.vocab_size}: the draft vocabulary "
                "is a part of the vocabulary"
            )
        return self

    @property
    def head_rows(self) -> int:
        """Rows of each head's output matrix: K with a draft vocabulary, else V."""
        return self.draft_vocab_size or self.vocab_size

    def to_json(self) -> dict[str, Any]:
        """The contents of config.json: every field of the network."""
        return self.model_dump(mode="json", exclude={"init"})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what to_json wrote; the keys in IGNORED_KEYS may hold anything. A switch that is missing is at its
        default, a number is not. A ValueError names what is missing, unknown or wrong."""
        missing = [
            f"{name}: field required"
            for name, field in cls.model_fields.items()
            if name != "init" and name not in values and not isinstance(field.default, bool | None)
        ]
        if missing:
            raise ValueError("; ".join(missing))
        try:
            return cls.model_validate({key: value for key, value in values.items() if key not in IGNORED_KEYS})
        except ValidationError as error:
            raise ValueError("; ".join(explain(error))) from None

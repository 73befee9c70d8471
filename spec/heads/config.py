"""What a speculator is: one frozen object, written to and read from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_args

from spec.config import MEDUSA, Dims, Method, check_recurrent, format_dims, parse_dims

# Keys that from_json passes over: to_json writes the first three for other readers, earlier versions wrote the fourth,
# and tools of the Hugging Face family add the rest. None of them says anything about the network.
IGNORED_KEYS = frozenset(
    {
        "architectures",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "_name_or_path",
    }
)

_DIMS = ("inner_dim", "emb_dim", "proj_dim")
_COUNTS = ("hidden_size", "vocab_size", "n_predict")
_FLAGS = ("scale_input", "tie_weights", "tie_lstm_embs")


@dataclass(frozen=True, kw_only=True)
class SpeculatorConfig:
    """The shape of a speculator and the base model that it belongs to.

    Attributes:
        method: ``sum_rnn`` or ``sum_lstm``.
        hidden_size: width d of the base's hidden states.
        vocab_size: V, the rows of the base's lm_head (padding included; not ``len(tokenizer)``).
        n_predict: number of heads n. The mixing weight depends on it, so it stays what it was in
            training, even where fewer heads are asked for.
        inner_dim: widths of the path from the sum to the head.
        emb_dim: widths of the token embedding's stack.
        proj_dim: widths of the state projection's stack; ends in the same width as emb_dim.
        scale_input: normalise the base's states before the first head.
        tie_weights: all heads share embedding, norm and output Linear.
        tie_lstm_embs: the four gates of sum_lstm share one embedding (other methods: unused).
        draft_vocab_size: K, rows of the heads' output when they draft from a part of the vocabulary; None for all V.
        base_model_name_or_path: where the base came from.
        base_revision: its revision, where it has one.
        base_digest: identity of the base's weights; empty where it is not known (a head from elsewhere).

    Raises:
        ValueError: values that make no network; the message names the fields and their values.
    """

    method: Method
    hidden_size: int
    vocab_size: int
    n_predict: int
    inner_dim: Dims
    emb_dim: Dims
    proj_dim: Dims
    base_model_name_or_path: str
    base_digest: str
    base_revision: str | None = None
    scale_input: bool = False
    tie_weights: bool = True
    tie_lstm_embs: bool = False
    draft_vocab_size: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if str(self.method) == "medusa":
            raise ValueError(MEDUSA)
        if self.method not in get_args(Method):
            raise ValueError(f"method is {self.method!r}, expected one of {', '.join(get_args(Method))}")
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size is {self.draft_vocab_size} and vocab_size {self.vocab_size}: the draft vocabulary "
                "is a part of the vocabulary"
            )
        check_recurrent(self.method, self.emb_dim, self.proj_dim, self.tie_weights)

    def _check_types(self) -> None:
        for name in _DIMS:
            dims = getattr(self, name)
            if not isinstance(dims, tuple) or not dims or not all(_is_count(width) for width in dims):
                raise ValueError(f"{name} is {dims!r}, expected a tuple of positive integers")
        for name in _COUNTS:
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a positive integer")
        if self.draft_vocab_size is not None and not _is_count(self.draft_vocab_size):
            raise ValueError(f"draft_vocab_size is {self.draft_vocab_size!r}, expected a positive integer or None")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected true or false")
        for name in ("method", "base_model_name_or_path", "base_digest"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a string")
        if self.base_revision is not None and not isinstance(self.base_revision, str):
            raise ValueError(f"base_revision is {self.base_revision!r}, expected a string or None")

    @property
    def sum_width(self) -> int:
        """Width w at which token embedding and projected state are added."""
        return self.emb_dim[-1]

    @property
    def head_width(self) -> int:
        """Width of the vector that each head's Linear reads."""
        return self.inner_dim[-1]

    @property
    def head_rows(self) -> int:
        """Rows of each head's Linear: K with a draft vocabulary, else V."""
        return self.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size

    def to_json(self) -> dict[str, Any]:
        """The contents of config.json: every field, widths as parse_dims reads them, and what other readers expect."""
        return {
            "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"],
            "model_type": "mlp_speculator",
            # A reader that derives a head size from the config divides by this one (vllm#34106).
            "num_attention_heads": 1,
            **{f.name: getattr(self, f.name) for f in fields(self)},
            **{name: format_dims(getattr(self, name)) for name in _DIMS},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SpeculatorConfig:
        """Read what to_json wrote; the keys in IGNORED_KEYS may hold anything.

        Raises:
            ValueError: unknown or missing keys, or values that make no network.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known - IGNORED_KEYS)
        if unknown:
            raise ValueError(f"unknown keys {', '.join(unknown)}: expected {', '.join(sorted(known))}")
        required = {f.name for f in fields(cls) if f.default is MISSING}
        missing = sorted(required - set(values))
        if missing:
            raise ValueError(f"missing keys {', '.join(missing)}: this is not a speculator's config.json")
        read = {name: values[name] for name in known & set(values)}
        for name in _DIMS:
            try:
                read[name] = parse_dims(read[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return cls(**read)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1

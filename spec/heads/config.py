"""What a speculator is: one frozen object, written to and read from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError, model_validator

from spec.config import MethodField, check_recurrent
from spec.section import DimsField, Positive, Section, explain

# Keys that from_json passes over: to_json writes the first three for other readers, and tools of the Hugging Face
# family add the rest. None of them says anything about the network.
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


class SpeculatorConfig(Section):
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
        base_model_name_or_path: where the base came from.
        base_digest: identity of the base's weights; empty where it is not known (a head from elsewhere).
        base_revision: the base's revision, where it has one.
        scale_input: normalise the base's states before the first head.
        tie_weights: all heads share embedding, norm and output Linear.
        tie_lstm_embs: the four gates of sum_lstm share one embedding (other methods: unused).
        draft_vocab_size: K, rows of the heads' output when they draft from a part of the vocabulary; None for all V.
    """

    method: MethodField
    hidden_size: Positive
    vocab_size: Positive
    n_predict: Positive
    inner_dim: DimsField
    emb_dim: DimsField
    proj_dim: DimsField
    base_model_name_or_path: str
    base_digest: str
    base_revision: str | None = None
    scale_input: bool = False
    tie_weights: bool = True
    tie_lstm_embs: bool = False
    draft_vocab_size: Positive | None = None

    @model_validator(mode="after")
    def _makes_a_network(self) -> SpeculatorConfig:
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"draft_vocab_size is {self.draft_vocab_size} and vocab_size {self.vocab_size}: the draft vocabulary "
                "is a part of the vocabulary"
            )
        check_recurrent(self.method, self.emb_dim, self.proj_dim, self.tie_weights)
        return self

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
        return self.draft_vocab_size or self.vocab_size

    def to_json(self) -> dict[str, Any]:
        """The contents of config.json: every field, and what other readers expect."""
        return {
            "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"],
            "model_type": "mlp_speculator",
            # A reader that derives a head size from the config divides by this one (vllm#34106).
            "num_attention_heads": 1,
            **self.model_dump(mode="json"),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SpeculatorConfig:
        """Read what to_json wrote; the keys in IGNORED_KEYS may hold anything.

        Raises:
            ValueError: unknown or missing keys, or values that make no network; says which.
        """
        try:
            return cls.model_validate({key: value for key, value in values.items() if key not in IGNORED_KEYS})
        except ValidationError as error:
            raise ValueError("; ".join(explain(error))) from None

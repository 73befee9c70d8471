"""What sum_rnn and sum_lstm share: their parameters, the mixing of state and token, starting weights and cost."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from spec.heads.config import Params, SpeculatorConfig
from spec.heads.init import centred, draw, principal_directions, rotation, unit_rows
from spec.heads.layers import PerHead, rms_normalize
from spec.heads.position_wise import PositionWise
from spec.section import DimsField


class RecurrentParams(Params):
    """Widths, and what heads share.

    Attributes:
        inner_dim: widths of the path from the sum to the head.
        emb_dim: widths of the token embedding's stack.
        proj_dim: widths of the state projection's stack; ends in the same width as emb_dim.
        scale_input: normalise the base's states before the first head.
        tie_weights: all heads share embedding, norm and output Linear.
    """

    inner_dim: DimsField = (1024,)
    emb_dim: DimsField = (1024,)
    proj_dim: DimsField = (1024,)
    scale_input: bool = False
    tie_weights: bool = True

    @model_validator(mode="after")
    def _addable(self) -> Self:
        if self.sum_width != self.proj_dim[-1]:
            raise ValueError(
                f"emb_dim ends in {self.sum_width} and proj_dim in {self.proj_dim[-1]}: the token embedding and the "
                "projected state are added, so their last widths must be equal"
            )
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
    def output_matrices(self) -> int:
        """One that all heads share, or one a head."""
        return 1 if self.tie_weights else self.n_predict

    def as_wide_as(self, hidden_size: int) -> Self:
        """One width for all, the base's."""
        widths = dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), (hidden_size,))
        return super().as_wide_as(hidden_size).model_copy(update=widths)


class RecurrentConfig(RecurrentParams, SpeculatorConfig):
    """The parameters and the base."""

    def to_json(self) -> dict[str, Any]:
        """Every field of the network, and what readers of such heads expect."""
        return {
            "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"],
            "model_type": "mlp_speculator",
            # A reader that derives a head size from the config divides by this one (vllm#34106).
            "num_attention_heads": 1,
            **super().to_json(),
        }


class Recurrent(PositionWise):
    """Heads that add the token's embedding to the projected state, and hand the result to the next head."""

    config: RecurrentConfig

    @abstractmethod
    def state_projections(self) -> PerHead[nn.Module]:
        """Those through which a state reaches the output unchanged in kind: all, or of an LSTM the cell's."""

    @classmethod
    def operations(cls, config: RecurrentConfig) -> float:  # type: ignore[override]
        """Each head's output matrix, and its projection from the base's width (the first) or from its own."""
        n, h = config.n_predict, config.head_width
        return n * config.head_rows * h + h * config.hidden_size + (n - 1) * h**2

    @torch.no_grad()
    def initialise(self, tables: Mapping[str, Tensor] | None = None, seed: int = 0) -> None:
        """Random weights (init.draw), and with the base's "embedding" and "lm_head", both [V, d], in addition:

        - Heads and token tables get the geometry of the base's tables at the random weights' scale, so that the first
          loss is below or near ln V. A table is centred (the mean row adds the same to every logit, which a softmax
          does not see, and is nearly half of a real lm_head's norm), reduced to its leading principal components where
          it is wider than the speculator's, and rescaled to rows of mean square 1. Where lm_head is narrower than
          the head, the head's remaining columns stay random; at equal widths nothing is left out.
        - Token tables are turned by a random rotation. In most bases they share their coordinates with lm_head, so
          that a token added to the state would make every head predict the token that it has just read.
        - The first projection (of sum_lstm: the cell's) maps the base's state onto lm_head's directions, and later ones
          carry it on unchanged where no stack lies between: head and state share their coordinates from the start.
        - The other Linears (of stacks, adapters and gates) stay random.
        """
        draw(self, seed)
        if tables is None:
            return
        config, (embedding, lm_head) = self.config, self._fitting(tables)
        generator = torch.Generator().manual_seed(seed)
        rows = centred(lm_head if self.token_map is None else lm_head[self.token_map.to(lm_head.device)])
        columns = unit_rows(rows @ principal_directions(rows, config.head_width))  # [V or K, k]
        k = columns.shape[1]
        for i in range(config.n_predict):
            self.head(i).weight[:, :k].copy_(columns * math.sqrt(k / config.head_width))
        projections = self.state_projections()
        directions = principal_directions(rows, config.proj_dim[0])  # [d, k]
        _first_linear(projections(0)).weight[: directions.shape[1]].copy_(directions.T)
        tokens = centred(embedding)
        tokens = unit_rows(tokens @ principal_directions(tokens, config.emb_dim[0]))
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                module.weight.copy_(tokens @ rotation(tokens.shape[1], config.emb_dim[0], generator).to(tokens.device))
        if config.inner_dim == config.proj_dim and len(config.proj_dim) == 1:
            for projection in projections[1:]:
                nn.init.eye_(_first_linear(projection).weight)

    def _fitting(self, tables: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        expected = (self.config.vocab_size, self.config.hidden_size)
        for name in ("embedding", "lm_head"):
            if tables[name].shape != expected:
                raise ValueError(
                    f"{name} has shape {list(tables[name].shape)}, expected {list(expected)} (vocab_size, hidden_size)"
                )
        return tables["embedding"], tables["lm_head"]

    def _scaled(self, states: Tensor) -> Tensor:
        """The states as the first projection reads them: with scale_input, rms_normalize(h) / sqrt(2)."""
        states = states.to(self.head(0).weight.dtype)
        return rms_normalize(states) / math.sqrt(2) if self.config.scale_input else states


def mixing_weight(config: RecurrentConfig) -> float:
    """Alpha, by which the token embedding is multiplied before it is added to the projected state.

    It lets the base's state keep half of the magnitude up to the last head (fms-extras, ArcticTraining:
    ``emb_weight / state_weight``). Their formula counts on an embedding of variance 1/w, which is true of a table
    at initialisation; a stack ends in a Linear over unit variance, so there the factor w is left out.
    """
    state_weight: float = 0.5 ** (0.5 / config.n_predict)
    width = config.sum_width if len(config.emb_dim) == 1 else 1
    return math.sqrt((1 - state_weight**2) * width / 2) / state_weight


def _first_linear(projection: nn.Module) -> nn.Linear:
    module = projection[0] if isinstance(projection, nn.Sequential) else projection
    assert isinstance(module, nn.Linear)
    return module

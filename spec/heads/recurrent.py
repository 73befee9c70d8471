"""What sum_rnn and sum_lstm share: small recurrent networks that draft from one position at a time, by the base's last
state there. Each depth is a head, which adds a token's embedding to the projected state and passes on the result."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from spec.heads.config import Params, SpeculatorConfig
from spec.heads.init import centred, draw, principal_directions, rotation, unit_rows
from spec.heads.layers import PerHead, rms_normalize
from spec.heads.packed import LAST, Packed, Tap
from spec.heads.speculator import Choose, Session, Speculator
from spec.section import DimsField

Carry = tuple[Tensor, ...]


class RecurrentParams(Params):
    """Widths of stacks, and what heads share."""

    inner_dim: DimsField = (1024,)  # of the path from the sum to the head
    emb_dim: DimsField = (1024,)  # of the token embedding
    proj_dim: DimsField = (1024,)  # of the state projection; ends in the same width as emb_dim
    scale_input: bool = False  # normalise the base's states before the first head
    tie_weights: bool = True  # all heads share embedding, norm and output Linear

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


class Recurrent(Speculator):
    """A network that starts from h_t and takes one step for each head."""

    joint: ClassVar[bool] = True
    config: RecurrentConfig

    head: Callable[[int], nn.Linear]
    """The Linear of head i, [V or K, head width]; the same one for every i where heads are tied."""

    @abstractmethod
    def state_projections(self) -> PerHead[nn.Module]:
        """The projections whose output becomes the next state: all of them, or in an LSTM those of the cell."""

    def start(self, states: Tensor) -> Carry:
        """What head 0 needs of the base's states [P, d], in the speculator's dtype; its first part is the state as the
        first projection reads it: with scale_input, rms_normalize(h) / sqrt(2)."""
        states = states.to(self.head(0).weight.dtype)
        return (rms_normalize(states) / math.sqrt(2) if self.config.scale_input else states,)

    @abstractmethod
    def step(self, i: int, carry: Carry, tokens: Tensor) -> tuple[Carry, Tensor]:
        """Run head i, after head i - 1 or `start`, up to its Linear, on ids x_{t+1+i} [P] of the full vocabulary: the
        carry for the next head, and the vector [P, head width] that the Linear reads."""

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        """All heads' logits [n, P, V or K] of states [P, d] and true tokens [P, n]; column i holds x_{t+1+i}."""
        carry, logits = self.start(states), []
        for i in range(self.config.n_predict):
            carry, hidden = self.step(i, carry, tokens[:, i])
            logits.append(self.head(i)(hidden))
        return torch.stack(logits)

    def output(self, k: int) -> Tensor:
        return self.head(k).weight

    def unroll(self, packed: Packed, rows: Sequence[Tensor]) -> list[Tensor]:
        carry = self.start(packed.states[LAST])
        ids = F.pad(packed.ids, (0, len(rows)))  # past the end of a sequence nothing is asked for
        vectors = []
        for i, chosen in enumerate(rows):
            carry, hidden = self.step(i, carry, ids[packed.starts + 1 + i])
            vectors.append(hidden.index_select(0, chosen))
        return vectors

    def draft_along(self, packed: Packed, rows: Tensor, n: int, choose: Choose | None = None) -> Tensor:
        return self.draft(packed.states[LAST][rows], packed.ids[packed.starts[rows] + 1], n, choose)

    def session(self) -> Session:
        return _Session(self)

    @torch.inference_mode()
    def draft(self, states: Tensor, tokens: Tensor, n: int | None = None, choose: Choose | None = None) -> Tensor:
        """Drafts [P, k] (n_predict at most, by default) of x_{t+2}, x_{t+3}, .., as draft_along says, from the base's
        states h_t [P, d] and the tokens x_{t+1} [P] after them."""
        carry, read, drafts = self.start(states), tokens, []
        for i in range(self.config.n_predict if n is None else n):
            carry, hidden = self.step(i, carry, read)
            found = self.drafted(i, hidden, choose)
            if found is None:
                break
            read = found
            drafts.append(found)
        return torch.stack(drafts, 1) if drafts else tokens.new_empty(len(tokens), 0)

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
          the head, the head's remaining columns stay random.
        - Token tables are turned by a random rotation. In most bases they share their coordinates with lm_head, so
          that a token added to the state would make every head predict the token that it has just read.
        - The first projection (of sum_lstm: the cell's) maps the base's state onto lm_head's directions, and later ones
          carry it on unchanged where no stack lies between. The other Linears stay random.
        """
        draw(self, seed)
        if tables is None:
            return
        config, (embedding, lm_head) = self.config, (tables["embedding"], tables["lm_head"])
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


class _Session(Session):
    """The newest state and token: such a head remembers nothing else."""

    def __init__(self, speculator: Recurrent) -> None:
        self._speculator = speculator

    def extend(self, states: Mapping[Tap, Tensor], tokens: Tensor) -> None:
        self._state, self._token = states[LAST][-1:], tokens[-1:]

    def draft(self, n: int, choose: Choose | None = None) -> Tensor:
        return self._speculator.draft(self._state, self._token, n, choose)[0]

    def crop(self) -> None:
        pass


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

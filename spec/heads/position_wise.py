"""Speculators that draft at each position by itself, from the base's last state there: sum_rnn and sum_lstm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spec.heads.packed import LAST, Packed, Tap
from spec.heads.speculator import Session, Speculator

Carry = tuple[Tensor, ...]


class PositionWise(Speculator):
    """A small recurrent network that starts from h_t and takes one step for each depth; a depth is a head."""

    joint: ClassVar[bool] = True

    head: Callable[[int], nn.Linear]
    """The Linear of head i, [V or K, head width]; the same one for every i where heads are tied."""

    @abstractmethod
    def start(self, states: Tensor) -> Carry:
        """What head 0 needs of the base's states [P, d]; they are cast to the speculator's dtype."""

    @abstractmethod
    def step(self, i: int, carry: Carry, tokens: Tensor) -> tuple[Carry, Tensor]:
        """Run head i up to its Linear.

        Args:
            i: the head, from 0; heads run in order.
            carry: from start (i = 0) or from head i-1.
            tokens: [P] ids x_{t+1+i} in the full vocabulary.

        Returns:
            The carry for head i+1, and the vector [P, head width] that head i's Linear reads.
        """

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

    def draft_along(self, packed: Packed, rows: Tensor, n: int) -> Tensor:
        return self.draft(packed.states[LAST][rows], packed.ids[packed.starts[rows] + 1], n)

    def session(self) -> Session:
        return _Session(self)

    @torch.inference_mode()
    def draft(self, states: Tensor, tokens: Tensor, n: int | None = None) -> Tensor:
        """Draft greedily: each head reads the draft of the one before.

        Args:
            states: [P, d] the base's states h_t.
            tokens: [P] x_{t+1}, the tokens that the base produced from these states.
            n: number of drafts, n_predict by default.

        Returns:
            [P, n] drafts of x_{t+2}, x_{t+3}, ..., as ids of the full vocabulary.

        Raises:
            ValueError: n is below 1 or above n_predict.
        """
        n = self.config.n_predict if n is None else n
        if not 1 <= n <= self.config.n_predict:
            raise ValueError(f"asked for {n} drafts, but the speculator has n_predict = {self.config.n_predict} heads")
        carry = self.start(states)
        drafts = []
        for i in range(n):
            carry, hidden = self.step(i, carry, tokens)
            tokens = self.head(i)(hidden).max(-1).indices  # four times as fast as argmax in bf16 on a CPU
            if self.token_map is not None:
                tokens = self.token_map[tokens]
            drafts.append(tokens)
        return torch.stack(drafts, 1)


class _Session(Session):
    """The newest state and token: such a head remembers nothing else."""

    def __init__(self, speculator: PositionWise) -> None:
        self._speculator = speculator

    def extend(self, states: Mapping[Tap, Tensor], tokens: Tensor) -> None:
        self._state, self._token = states[LAST][-1:], tokens[-1:]

    def draft(self, n: int) -> Tensor:
        return self._speculator.draft(self._state, self._token, n)[0]

    def crop(self, n: int) -> None:
        pass

"""The interface that all speculators share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from spec.heads.config import SpeculatorConfig
from spec.heads.layers import RMSNorm, rms_normalize


@dataclass(frozen=True)
class Tap:
    """One vector of the base for each of some positions of a sequence.

    Attributes:
        layer: the output after so many layers (0: the embedded tokens), or None: the last state, after the final
            norm, which lm_head reads.
        positions: "answers", those t whose next token x_{t+1} is supervised, or "all".
    """

    layer: int | None = None
    positions: Literal["answers", "all"] = "answers"


LAST = Tap()
"""What lm_head reads where an answer is written; the base's own distributions follow from it."""


@dataclass(frozen=True)
class Packed:
    """Whole sequences, one after the other: T tokens of R sequences.

    Attributes:
        ids: [T].
        mask: [T], whether a token is supervised.
        offsets: R + 1 places where sequences begin, and T; on the CPU, whatever the device.
        starts: [P] ascending places t from which heads draft, those of "answers": x_{t+1} is supervised.
        states: by tap its vectors, [P, width] (answers) or [T, width] (all).
    """

    ids: Tensor
    mask: Tensor
    offsets: tuple[int, ...]
    starts: Tensor
    states: Mapping[Tap, Tensor]

    @classmethod
    def join(cls, parts: Sequence[Packed]) -> Packed:
        """The sequences of all parts, of which there is at least one, in order."""
        ends = list(accumulate((part.offsets[-1] for part in parts), initial=0))
        return cls(
            torch.cat([part.ids for part in parts]),
            torch.cat([part.mask for part in parts]),
            (0, *(end + offset for end, part in zip(ends, parts, strict=False) for offset in part.offsets[1:])),
            torch.cat([part.starts + end for end, part in zip(ends, parts, strict=False)]),
            {tap: torch.cat([part.states[tap] for part in parts]) for tap in parts[0].states},
        )

    def to(self, device: torch.device) -> Packed:
        """The same on a device; the copy from page-locked memory does not wait."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Packed:
        """The same in page-locked memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Packed:
        states = {tap: change(tensor) for tap, tensor in self.states.items()}
        return Packed(change(self.ids), change(self.mask), self.offsets, change(self.starts), states)


Carry = tuple[Tensor, ...]


class Speculator(nn.Module):
    """Draft heads over a frozen base model's hidden states.

    At position t the base's state h_t (after its final norm: the vector that lm_head reads) has already produced
    x_{t+1}. Head i reads x_{t+1+i} and predicts x_{t+2+i}; so head 0 never learns x_{t+1}.

    P counts positions, of one sequence or of many: every position is on its own. d is the base's hidden size, V its
    vocabulary, n the number of heads, K the draft vocabulary.

    Args:
        config: the network's shape.
        token_map: [K] ascending ids of the draft vocabulary in the full one; exactly where config.draft_vocab_size
            is set.

    Raises:
        ValueError: a token_map that does not fit config.draft_vocab_size.
    """

    head: Callable[[int], nn.Linear]
    """The Linear of head i, [V or K, head width]; the same one for every i where heads are tied."""

    token_map: Tensor | None
    """[K] the full id of each draft id, or None where heads draft from the whole vocabulary."""

    def __init__(self, config: SpeculatorConfig, token_map: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("token_map", _checked(token_map, config))

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

    def logits(self, i: int, hidden: Tensor) -> Tensor:
        """Head i's logits for x_{t+2+i}: [P, head width] -> [P, V], or [P, K] with a draft vocabulary."""
        logits: Tensor = self.head(i)(hidden)
        return logits

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        """All heads' logits with the true tokens as inputs (teacher forcing).

        Args:
            states: [P, d] the base's states h_t.
            tokens: [P, n] ids; column i holds x_{t+1+i}.

        Returns:
            [n, P, V], or [n, P, K] with a draft vocabulary; entry i predicts x_{t+2+i}.
        """
        n = self.config.n_predict
        if tokens.shape[-1] != n:
            raise ValueError(f"tokens has {tokens.shape[-1]} columns, expected n_predict = {n}")
        carry = self.start(states)
        out = []
        for i in range(n):
            carry, hidden = self.step(i, carry, tokens[:, i])
            out.append(self.logits(i, hidden))
        return torch.stack(out)

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
            tokens = self.logits(i, hidden).max(-1).indices  # four times as fast as argmax in bf16 on a CPU
            if self.token_map is not None:
                tokens = self.token_map[tokens]
            drafts.append(tokens)
        return torch.stack(drafts, 1)

    @property
    def draft_index(self) -> Tensor | None:
        """[V] the draft id of each full id, -1 where it is not drafted; None without a draft vocabulary. Made anew each
        time, since the token map may come from a checkpoint: keep it for a loop."""
        if self.token_map is None:
            return None
        index = self.token_map.new_full((self.config.vocab_size,), -1)
        index[self.token_map] = torch.arange(len(self.token_map), device=index.device)
        return index

    def targets(self, tokens: Tensor) -> Tensor:
        """The logits' index of each full id [..] -> [..]: -1 for an id outside the draft vocabulary."""
        index = self.draft_index
        return tokens if index is None else index[tokens]

    def num_parameters(self) -> int:
        """Number of parameters, each shared one counted once."""
        return sum(p.numel() for p in self.parameters())

    def undecayed(self) -> frozenset[str]:
        """Names of the parameters that weight decay must leave alone: norms, and token tables, whose rare rows it
        would wear away between their few gradients."""
        return frozenset(
            f"{name}.{parameter}"
            for name, module in self.named_modules()
            if isinstance(module, RMSNorm | nn.Embedding)
            for parameter, _ in module.named_parameters()
        )

    def _scaled(self, states: Tensor) -> Tensor:
        """The states as the first projection reads them: with scale_input, rms_normalize(h) / sqrt(2)."""
        states = states.to(self.head(0).weight.dtype)
        return rms_normalize(states) / math.sqrt(2) if self.config.scale_input else states


def mixing_weight(config: SpeculatorConfig) -> float:
    """Alpha, by which the token embedding is multiplied before it is added to the projected state.

    It lets the base's state keep half of the magnitude up to the last head (fms-extras, ArcticTraining:
    ``emb_weight / state_weight``). Their formula counts on an embedding of variance 1/w, which is true of a table
    at initialisation; a stack ends in a Linear over unit variance, so there the factor w is left out.
    """
    state_weight: float = 0.5 ** (0.5 / config.n_predict)
    width = config.sum_width if len(config.emb_dim) == 1 else 1
    return math.sqrt((1 - state_weight**2) * width / 2) / state_weight


def _checked(token_map: Tensor | None, config: SpeculatorConfig) -> Tensor | None:
    K, V = config.draft_vocab_size, config.vocab_size
    if K is None and token_map is None:
        return None
    if K is None or token_map is None:
        given = "no token_map" if token_map is None else f"a token_map of {len(token_map)} ids"
        raise ValueError(f"{given} was given, but draft_vocab_size is {K}")
    token_map = token_map.to(torch.int64).clone()
    if token_map.shape != (K,):
        raise ValueError(f"token_map has shape {list(token_map.shape)}, expected [{K}] (draft_vocab_size)")
    if not bool((token_map[1:] > token_map[:-1]).all()):
        raise ValueError("token_map is not in ascending order without repeats")
    first, last = int(token_map[0]), int(token_map[-1])
    if first < 0 or last >= V:
        raise ValueError(f"token_map spans {first}..{last}, expected ids in 0..{V - 1}")
    return token_map

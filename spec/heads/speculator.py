"""The interface that all speculators share; nothing outside spec/heads knows more of them than this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from spec.heads.config import Params, SpeculatorConfig
from spec.heads.layers import RMSNorm
from spec.heads.packed import Packed, Tap

CHUNK_LOGITS = 2**24
"""Logits [rows, V] that exist at one time while drafts are made."""

Choose = Callable[[Tensor, Tensor], Tensor | None]
"""Decides, depth by depth, what is drafted: it takes a depth's likeliest tokens [M], as ids of the full vocabulary, and
their probabilities [M], and returns the tokens [M] that are drafted there and that the next depth reads. None ends the
draft."""


class Session(ABC):
    """What a speculator keeps of one sequence while it is decoded."""

    @abstractmethod
    def extend(self, states: Mapping[Tap, Tensor], tokens: Tensor) -> None:
        """Go on by S positions that the base has read; tokens [S] are those after each, the last the newest.

        States are [S, width]; at the prompt, taps of answers have the last position alone.
        """

    @abstractmethod
    def draft(self, n: int, choose: Choose | None = None) -> Tensor:
        """At most n drafts [k] of what follows the newest token, as ids of the full vocabulary: the likeliest ones, or
        those that `choose` decides on."""

    @abstractmethod
    def crop(self) -> None:
        """Undo the last draft: drop what it stored."""


class Speculator(nn.Module, ABC):
    """Draft heads over a frozen base model.

    At position t the base has already produced x_{t+1}. The draft of depth k that begins at t reads x_{t+1+k} and
    predicts x_{t+2+k}; so depth 0 never learns x_{t+1}.

    T counts tokens, P the positions from which drafts begin. d is the base's hidden size, V its vocabulary, n the
    number of depths, K the draft vocabulary; token_map [K] has its ascending ids in the full one.

    Raises:
        ValueError: a token_map that does not fit config.draft_vocab_size.
    """

    Params: ClassVar[type[Params]]
    """The method's section of params.yaml."""

    Config: ClassVar[type[SpeculatorConfig]]
    """Params, and what is known of the base: config.json."""

    joint: ClassVar[bool] = False
    """Whether it can be trained jointly with the base."""

    borrowed: ClassVar[Mapping[str, str]] = {}
    """Parameters that are tables of the base ("embedding" or "lm_head"), by name: neither trained nor saved."""

    token_map: Tensor | None
    """[K] the full id of each draft id, or None where the whole vocabulary is drafted from."""

    def __init__(self, config: SpeculatorConfig, token_map: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("token_map", _checked(token_map, config))

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The vectors of the base that it reads."""
        return self.config.taps(self.config.layers)

    @abstractmethod
    def output(self, k: int) -> Tensor:
        """The matrix [V or K, h] that makes logits of depth k's vectors; one tensor where depths share it."""

    @abstractmethod
    def unroll(self, packed: Packed, rows: Sequence[Tensor]) -> list[Tensor]:
        """All depths with the true tokens as inputs (teacher forcing): by depth the vectors [M_k, h] that its output
        matrix reads for x_{t+2+k}, of drafts that begin at packed.starts[rows[k]]."""

    @abstractmethod
    def draft_along(self, packed: Packed, rows: Tensor, n: int, choose: Choose | None = None) -> Tensor:
        """At most n drafts [M, k] that begin at packed.starts[rows], `rows` ascending, as ids of the full vocabulary;
        each depth reads the draft before it. They are the likeliest ones, or those that `choose` decides on."""

    def drafted(self, k: int, vectors: Tensor, choose: Choose | None) -> Tensor | None:
        """The drafts [M] of depth k, from the vectors [M, h] that its output matrix reads, as draft_along says."""
        weight, found, probabilities = self.output(k), list[Tensor](), list[Tensor]()
        for part in torch.split(vectors, max(1, CHUNK_LOGITS // len(weight))):
            logits = part @ weight.T
            likeliest = logits.max(-1)  # four times as fast as argmax in bfloat16 on a CPU
            found.append(likeliest.indices)
            if choose is not None:
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                probabilities.append((likeliest.values - wide.logsumexp(-1)).exp())
        tokens = torch.cat(found)
        tokens = tokens if self.token_map is None else self.token_map[tokens]
        return tokens if choose is None else choose(tokens, torch.cat(probabilities))

    @abstractmethod
    def session(self) -> Session:
        """A session for a new sequence."""

    @torch.no_grad()
    def lend(self, tables: Mapping[str, Tensor]) -> None:
        """Put the base's tables, each [V, d], into the places of what is borrowed."""
        for name, table in self.borrowed.items():
            module, _, parameter = name.rpartition(".")
            setattr(self.get_submodule(module), parameter, nn.Parameter(tables[table], requires_grad=False))

    @property
    def draft_index(self) -> Tensor | None:
        """[V] the draft id of each full id, -1 where it is not drafted; None without a draft vocabulary. Made anew each
        time, since the token map may come from a checkpoint: keep it for a loop."""
        if self.token_map is None:
            return None
        index = self.token_map.new_full((self.config.vocab_size,), -1)
        index[self.token_map] = torch.arange(len(self.token_map), device=index.device)
        return index

    def num_parameters(self) -> int:
        """Number of its own parameters, each shared one counted once."""
        return sum(p.numel() for name, p in self.named_parameters() if name not in self.borrowed)

    def undecayed(self) -> frozenset[str]:
        """Names of the parameters that weight decay must leave alone: norms, and token tables, whose rare rows it
        would wear away between their few gradients."""
        return frozenset(
            f"{name}.{parameter}"
            for name, module in self.named_modules()
            if isinstance(module, RMSNorm | nn.Embedding)
            for parameter, _ in module.named_parameters()
        )

    @abstractmethod
    def initialise(self, tables: Mapping[str, Tensor] | None = None, seed: int = 0) -> None:
        """Give the weights their first values, in place: random ones that follow from the seed, or where the base's
        "embedding" and "lm_head" [V, d] are given, from them."""

    @classmethod
    @abstractmethod
    def operations(cls, config: SpeculatorConfig) -> float:
        """Weights that one position's training step multiplies, of all depths."""


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

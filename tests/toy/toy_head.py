"""A head that someone else's package brings: it reads two layers at all positions, and remembers the sequence.

m_t = decay * m_{t-1} + a @ layer_1 + b @ layer_2 + E[x_{t+1}], over all positions of a sequence. The draft of depth 0
reads v = GELU(m_t + c @ h_t); each depth k after it moves the memory on by the draft before it, m = decay * m + u @ v +
E[x_{t+1+k}], and reads v = GELU(m). E is the base's embedding. So drafts leave traces, which crop must undo.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spec.heads import LAST, Choose, Packed, Params, Session, Speculator, SpeculatorConfig, Tap

LAYERS = (Tap(0, "all"), Tap(1, "all"))


class ToyParams(Params):
    """How much the memory keeps of what it held."""

    decay: float = 0.5

    def taps(self, layers: int | None) -> tuple[Tap, ...]:
        return (*LAYERS, LAST)


class ToyConfig(ToyParams, SpeculatorConfig):
    """The parameters and the base."""


class ToyHead(Speculator):
    Params, Config = ToyParams, ToyConfig
    borrowed: ClassVar[Mapping[str, str]] = {"embedding.weight": "embedding"}

    def __init__(self, config: ToyConfig, token_map: Tensor | None = None) -> None:
        super().__init__(config, token_map)
        d = config.hidden_size
        self.decay = config.decay
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.layers = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in LAYERS)
        self.last, self.onward = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.out = nn.Linear(d, config.head_rows, bias=False)

    @classmethod
    def operations(cls, config: SpeculatorConfig) -> float:
        d = config.hidden_size
        return (len(LAYERS) + 1 + config.n_predict - 1) * d * d + config.n_predict * d * config.head_rows

    def initialise(self, tables: Mapping[str, Tensor] | None, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5, generator=generator)

    def output(self, k: int) -> Tensor:
        return self.out.weight

    def read(self, states: Mapping[Tap, Tensor], tokens: Tensor) -> Tensor:
        """What each position adds to the memory, [S, d]."""
        vectors = [layer(states[tap].to(layer.weight.dtype)) for layer, tap in zip(self.layers, LAYERS, strict=True)]
        return torch.stack(vectors).sum(0) + self.embedding(tokens)

    def first(self, memory: Tensor, last: Tensor) -> Tensor:
        return F.gelu(memory + self.last(last.to(self.last.weight.dtype)))

    def go_on(self, memory: Tensor, vector: Tensor, tokens: Tensor) -> Tensor:
        return self.decay * memory + self.onward(vector) + self.embedding(tokens)

    def memories(self, packed: Packed) -> Tensor:
        """The memory after each position, [T, d]; nothing of one sequence reaches another."""
        read = self.read(packed.states, F.pad(packed.ids, (0, 1))[1:])
        kept = []
        for start, end in zip(packed.offsets, packed.offsets[1:], strict=False):
            memory = torch.zeros_like(read[0])
            for t in range(start, end):
                memory = self.decay * memory + read[t]
                kept.append(memory)
        return torch.stack(kept) if kept else read

    def unroll(self, packed: Packed, rows: Sequence[Tensor]) -> list[Tensor]:
        memory, ids = self.memories(packed)[packed.starts], F.pad(packed.ids, (0, len(rows)))
        vector = self.first(memory, packed.states[LAST])
        vectors = [vector[rows[0]]]
        for k, chosen in enumerate(rows[1:], 1):
            memory = self.go_on(memory, vector, ids[packed.starts + 1 + k])
            vector = F.gelu(memory)
            vectors.append(vector[chosen])
        return vectors

    def draft_along(self, packed: Packed, rows: Tensor, n: int, choose: Choose | None = None) -> Tensor:
        memory = self.memories(packed)[packed.starts[rows]]
        vector = self.first(memory, packed.states[LAST][rows])
        drafts = [packed.ids[packed.starts[rows] + 1]]
        while (found := self.drafted(len(drafts) - 1, vector, choose)) is not None:
            drafts.append(found)
            if len(drafts) > n:
                break
            memory = self.go_on(memory, vector, found)
            vector = F.gelu(memory)
        return torch.stack(drafts, 1)[:, 1:]

    def session(self) -> Session:
        return ToySession(self)


class ToySession(Session):
    """Keeps the memory after each position, and after each draft that was fed on."""

    def __init__(self, head: ToyHead) -> None:
        self.head = head
        self.kept = [torch.zeros_like(head.embedding.weight[0])]

    def extend(self, states: Mapping[Tap, Tensor], tokens: Tensor) -> None:
        for added in self.head.read(states, tokens):
            self.kept.append(self.head.decay * self.kept[-1] + added)
        self.last, self.sure = states[LAST][-1], len(self.kept)

    def draft(self, n: int, choose: Choose | None = None) -> Tensor:
        vector = self.head.first(self.kept[-1], self.last)[None]
        drafts = [torch.zeros(1, dtype=torch.int64)]
        while (found := self.head.drafted(len(drafts) - 1, vector, choose)) is not None:
            drafts.append(found)
            if len(drafts) > n:
                break
            self.kept.append(self.head.go_on(self.kept[-1], vector[0], found[0]))
            vector = F.gelu(self.kept[-1])[None]
        return torch.cat(drafts[1:]) if len(drafts) > 1 else drafts[0][:0]

    def crop(self) -> None:
        del self.kept[self.sure :]

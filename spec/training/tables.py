"""Token tables of which only the rows that occur are trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spec.heads import Speculator


class OccurringRows(nn.Module):
    """The rows of an embedding whose tokens occur in the training data, as a separate parameter.

    A row whose token never occurs has no gradient, and without weight decay AdamW never moves it. So training the
    others alone gives the same table, bit for bit, while gradients, optimizer state and what workers exchange are
    as small as the vocabulary in use (its ids [U], ascending). The whole table is not registered: its weight is no
    parameter of this module.
    """

    index: Tensor
    tokens: Tensor

    def __init__(self, table: nn.Embedding, tokens: Tensor) -> None:
        super().__init__()
        self._table = [table]
        self.weight = nn.Parameter(table.weight.detach()[tokens].clone())
        index = torch.zeros(table.num_embeddings, dtype=torch.int64, device=tokens.device)
        index[tokens] = torch.arange(len(tokens), device=tokens.device)
        self.register_buffer("index", index)
        self.register_buffer("tokens", tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..] -> [.., width]; tokens that do not occur read the first row: they stand only where nothing trains."""
        return F.embedding(self.index[tokens], self.weight)

    @torch.no_grad()
    def flush(self) -> None:
        """Write the rows into the whole table."""
        self._table[0].weight.index_copy_(0, self.tokens, self.weight)

    @torch.no_grad()
    def reload(self) -> None:
        """Take the rows over from the whole table."""
        self.weight.copy_(self._table[0].weight[self.tokens])


def twin(speculator: Speculator, tokens: Tensor) -> tuple[Speculator, list[OccurringRows]]:
    """A speculator that shares every parameter with another one, except that its token tables are OccurringRows of the
    ids [U], ascending, on its device. The other one is up to date after each table's flush."""
    replaced: dict[int, Any] = {
        id(module): OccurringRows(module, tokens)
        for module in speculator.modules()
        if isinstance(module, nn.Embedding) and module.weight.requires_grad
    }
    tables = list(replaced.values())
    for tensor in (*speculator.parameters(), *speculator.buffers()):
        replaced.setdefault(id(tensor), tensor)
    return copy.deepcopy(speculator, replaced), tables

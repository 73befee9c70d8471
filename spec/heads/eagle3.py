"""EAGLE-3: one attention layer over the sequence, served by vLLM, SGLang and llama.cpp (Li et al. 2025,
https://arxiv.org/abs/2503.01840; the layout of the weights is that of vLLM's llama_eagle3.py).

At position t the layer reads a pair of the token x_{t+1} and a vector: at depth 0 g_t = fc(the taps at t), at depth k
the layer's own output of depth k - 1 (after the output norm, if config.norm_output is set). A pair attends to the
depth-0 pairs up to t and to the earlier pairs of its own chain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spec.heads.config import Layer, Params, SpeculatorConfig
from spec.heads.init import draw
from spec.heads.packed import LAST, Packed, Tap
from spec.heads.speculator import Choose, Session, Speculator
from spec.section import Positive, listed

SCORES = 2**22
"""Attention scores that exist at one time in a chunk of queries; a longer sequence is computed in several chunks."""

FC_SPREAD = 0.1
"""Of fc's random part, next to the identity, where it starts from the base."""

Keys = tuple[Tensor, Tensor]
"""Keys and values, each [.., KV, head_dim]."""


class Eagle3Params(Params):
    """Attributes:
    aux_layers: ascending numbers k; it reads the output after k layers. None: 2, L // 2 and L - 3 of L layers.
    """

    # A head that drafts as far as it is asked is the same network whatever n_predict it was trained with.
    free: ClassVar[frozenset[str]] = frozenset({"init", "n_predict", "aux_layers"})

    aux_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...] | None, BeforeValidator(listed)] = None

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        ids = self.aux_layers
        if ids is not None and (not ids or any(a >= b for a, b in itertools.pairwise(ids))):
            raise ValueError(f"aux_layers is {list(ids)}: name at least one layer, in ascending order without repeats")
        return self

    def taps(self, layers: int | None) -> tuple[Tap, ...]:
        if layers is None:
            raise ValueError("eagle3 reads layers of its base, and how many that has is not known")
        ids = self.aux_layers
        if ids is None:
            found = {2, layers // 2, layers - 3} if layers >= 7 else {min(1, layers - 1), layers // 2, layers - 1}
            ids = tuple(sorted(found))
        if ids[-1] >= layers:
            raise ValueError(f"aux_layers: the base has the layers 0 to {layers - 1}, found {list(ids)}")
        return (*(Tap(layer, "all") for layer in ids), LAST)

    @property
    def head_weights(self) -> tuple[float, ...]:
        return tuple(0.8**k for k in range(self.n_predict))

    @property
    def longest_draft(self) -> int | None:
        return None


class Eagle3Config(Eagle3Params, SpeculatorConfig):
    """The parameters and the base."""

    layers: Positive
    layer: Layer
    norm_output: bool = False  # as some public heads have it; on the embedded default it gained nothing


class Eagle3(Speculator):
    """The draft layer, its input fc, its output norm and lm_head; it borrows the base's embedding."""

    Params, Config = Eagle3Params, Eagle3Config
    borrowed: ClassVar[Mapping[str, str]] = {"embed_tokens.weight": "embedding"}

    config: Eagle3Config

    def __init__(self, config: Eagle3Config, token_map: Tensor | None = None) -> None:
        super().__init__(config, token_map)
        d = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        self.fc = nn.Linear((len(config.taps(config.layers)) - 1) * d, d, bias=False)
        self.midlayer = DraftLayer(d, config.layer)
        self.norm = Norm(d, config.layer.eps)
        self.lm_head = nn.Linear(d, config.head_rows, bias=False)

    @classmethod
    def operations(cls, config: SpeculatorConfig) -> float:
        """The layer and the output matrix for each depth; fc and the keys of the sequence once."""
        assert isinstance(config, Eagle3Config)
        d, layer = config.hidden_size, config.layer
        keys = 2 * 2 * d * layer.kv_heads * layer.head_dim
        mixing = 3 * d * layer.heads * layer.head_dim + 3 * d * layer.intermediate_size
        return (len(config.taps(config.layers)) - 1) * d * d + config.n_predict * (keys + mixing + d * config.head_rows)

    @torch.no_grad()
    def initialise(self, tables: Mapping[str, Tensor] | None = None, seed: int = 0) -> None:
        """Random weights (init.draw), and with the base's tables in addition:

        - lm_head gets the base's rows, and fc passes on the highest tap with a little of everything.
        - Where the base's last layer is like this one ("layer." and a name of DraftLayer, and "norm.weight" among the
          tables), layer and norm begin as it is; both halves of a pair are read alike.
        """
        draw(self, seed)
        if tables is None:
            return
        rows = tables["lm_head"]
        self.lm_head.weight.copy_(rows if self.token_map is None else rows[self.token_map.to(rows.device)])
        d = self.config.hidden_size
        self.fc.weight.mul_(FC_SPREAD)[:, -d:].add_(torch.eye(d))
        found = {name.removeprefix("layer."): tables[name] for name in tables if name.startswith("layer.")}
        if not found:
            return
        self.norm.weight.copy_(tables["norm.weight"])
        for name, parameter in self.midlayer.named_parameters():
            table = found.get("input_layernorm.weight" if name == "hidden_norm.weight" else name)
            if table is not None:
                parameter.copy_(table if table.shape == parameter.shape else table.repeat(1, 2))
            elif parameter.ndim == 1:  # a bias that the base lacks
                parameter.zero_()

    def undecayed(self) -> frozenset[str]:
        return frozenset(name for name, parameter in self.named_parameters() if parameter.ndim == 1)

    def output(self, k: int) -> Tensor:
        return self.lm_head.weight

    def unroll(self, packed: Packed, rows: Sequence[Tensor]) -> list[Tensor]:
        ids = F.pad(packed.ids, (0, len(rows)))  # past the end of a sequence nothing is asked for
        chains = self._chains(packed, packed.starts, packed.bounds, lambda k: ids[packed.starts + 1 + k])
        return [vectors.index_select(0, chosen) for chosen, vectors in zip(rows, chains, strict=False)]

    @torch.inference_mode()
    def draft_along(self, packed: Packed, rows: Tensor, n: int, choose: Choose | None = None) -> Tensor:
        starts = packed.starts[rows]
        bounds = torch.searchsorted(starts, torch.tensor(packed.offsets, device=starts.device)).tolist()
        read = [packed.ids[starts + 1]]
        for k, vectors in zip(range(n), self._chains(packed, starts, bounds, read.__getitem__), strict=False):
            drafted = self.drafted(k, vectors, choose)
            if drafted is None:
                break
            read.append(drafted)
        return torch.stack(read, 1)[:, 1:]

    def session(self) -> Session:
        return Eagle3Session(self)

    def inputs(self, states: Mapping[Tap, Tensor]) -> Tensor:
        """g [S, d] of the taps' vectors."""
        mixed: Tensor = self.fc(torch.cat([states[tap] for tap in self.taps[:-1]], -1).to(self.fc.weight.dtype))
        return mixed

    def pairs(self, tokens: Tensor, vectors: Tensor) -> Tensor:
        """What the layer reads of tokens x_{t+1+k} [M] and vectors [M, d]: [M, 2d]."""
        return self.midlayer.pairs(self.embed_tokens(tokens), vectors)

    def _chains(
        self,
        packed: Packed,
        starts: Tensor,
        bounds: Sequence[int],
        following: Callable[[int], Tensor],
    ) -> Iterator[Tensor]:
        """For depth 0, 1, .. without an end, the vectors [M, d] that lm_head reads, of the chains that begin at starts
        [M].

        Args:
            packed: the sequences.
            starts: ascending.
            bounds: R + 1, where each sequence's chains begin among starts.
            following: of a depth k the tokens x_{t+1+k} [M] that are read; asked once depth k - 1 was taken.
        """
        layer, offsets, place = self.midlayer, packed.offsets, packed.places
        read = self.inputs(packed.states)  # [T, d]
        keys = layer.keys(self.pairs(F.pad(packed.ids, (0, 1))[1:], read), place)
        # Nothing at all still goes through attention, so that each weight has its gradient. Parts are split off, not
        # sliced: the gradient of a split is one copy, that of a slice as large as the whole.
        counts, lengths = ([b - a for a, b in itertools.pairwise(ends)] or [0] for ends in (bounds, offsets))
        earlier = list(zip(*(torch.split(part, lengths) for part in keys), strict=True))
        begun = torch.split(place[starts], counts)
        vectors, own = read[starts], list[list[Any]]()
        for k in itertools.count():
            pairs = self.pairs(following(k), vectors)
            if k:
                pair = layer.keys(pairs, place[starts] + k)
                own.append(list(zip(*(torch.split(part, counts) for part in pair), strict=True)))
            queries = torch.split(layer.queries(pairs, place[starts] + k), counts)
            mixed = [
                attend(query, earlier[row], begun[row], [depth[row] for depth in own])
                for row, query in enumerate(queries)
            ]
            vectors = layer.finish(vectors, torch.cat(mixed))
            found = self.norm(vectors)
            yield found
            vectors = found if self.config.norm_output else vectors


class Eagle3Session(Session):
    """Keys and values of every pair so far, and of those that were drafted."""

    def __init__(self, head: Eagle3) -> None:
        self._head, self._length = head, 0  # pairs that are kept, those of drafts included
        layer = head.config.layer
        self._keys, self._values = head.fc.weight.new_empty(2, 256, layer.kv_heads, layer.head_dim)

    @torch.inference_mode()
    def extend(self, states: Mapping[Tap, Tensor], tokens: Tensor) -> None:
        vectors = self._head.inputs(states)
        pairs = self._head.pairs(tokens, vectors)
        self._append(pairs)
        self._pair, self._vector, self._read = pairs[-1:], vectors[-1:], self._length

    @torch.inference_mode()
    def draft(self, n: int, choose: Choose | None = None) -> Tensor:
        head, layer = self._head, self._head.midlayer
        pair, vector, drafts = self._pair, self._vector, list[Tensor]()
        for k in range(n):
            if k:
                pair = head.pairs(drafts[-1], vector)
                self._append(pair)
            place = torch.full((1,), self._length - 1, device=pair.device)
            kept = (self._keys[: self._length], self._values[: self._length])
            vector = layer.finish(vector, attend(layer.queries(pair, place), kept, place, []))
            found = head.norm(vector)
            drafted = head.drafted(k, found, choose)
            if drafted is None:
                break
            drafts.append(drafted)
            vector = found if head.config.norm_output else vector
        return torch.cat(drafts) if drafts else torch.empty(0, dtype=torch.int64, device=pair.device)

    def crop(self) -> None:
        self._length = self._read

    def _append(self, pairs: Tensor) -> None:
        start, self._length = self._length, self._length + len(pairs)
        if self._length > len(self._keys):
            grown = self._keys.new_empty(2, 2 * self._length, *self._keys.shape[1:])
            grown[0, :start], grown[1, :start] = self._keys[:start], self._values[:start]
            self._keys, self._values = grown
        places = torch.arange(start, self._length, device=pairs.device)
        keys, values = self._head.midlayer.keys(pairs, places)
        self._keys[start : self._length], self._values[start : self._length] = keys, values


class Norm(nn.Module):
    """RMSNorm without bias, over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """In float32, as the bases do it; of x's dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Its projections; queries, keys and values read pairs [.., 2d]."""

    def __init__(self, d: int, layer: Layer) -> None:
        super().__init__()
        queries, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        self.q_proj = nn.Linear(2 * d, queries, bias=layer.bias)
        self.k_proj, self.v_proj = (nn.Linear(2 * d, keys, bias=layer.bias) for _ in range(2))
        self.o_proj = nn.Linear(queries, d, bias=layer.bias)


class Mlp(nn.Module):
    """The feed-forward network with SiLU."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(d, width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(width, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[.., d] -> [.., d]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DraftLayer(nn.Module):
    """The layer, in the pieces of which a pass along a sequence and a session are made."""

    def __init__(self, d: int, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = (Norm(d, layer.eps) for _ in range(3))
        self.self_attn = Attention(d, layer)
        self.mlp = Mlp(d, layer.intermediate_size)

    def pairs(self, embedded: Tensor, vectors: Tensor) -> Tensor:
        """[M, d], [M, d] -> [M, 2d]."""
        return torch.cat([self.input_layernorm(embedded.to(vectors.dtype)), self.hidden_norm(vectors)], -1)

    def queries(self, pairs: Tensor, places: Tensor) -> Tensor:
        """[M, 2d] at places [M] -> [M, heads, head_dim], rotated."""
        return rotated(self._split(self.self_attn.q_proj(pairs), self.layer.heads), places, self.layer.rope_theta)

    def keys(self, pairs: Tensor, places: Tensor) -> Keys:
        """[M, 2d] at places [M] -> keys, rotated, and values, each [M, KV, head_dim]."""
        keys = rotated(self._split(self.self_attn.k_proj(pairs), self.layer.kv_heads), places, self.layer.rope_theta)
        return keys, self._split(self.self_attn.v_proj(pairs), self.layer.kv_heads)

    def finish(self, vectors: Tensor, mixed: Tensor) -> Tensor:
        """The layer's output [M, d] for its input vectors [M, d] and what attention made, [M, heads, head_dim]."""
        vectors = vectors + self.self_attn.o_proj(mixed.flatten(1))
        out: Tensor = vectors + self.mlp(self.post_attention_layernorm(vectors))
        return out

    def _split(self, projected: Tensor, heads: int) -> Tensor:
        return projected.view(len(projected), heads, self.layer.head_dim)


def rotated(x: Tensor, places: Tensor, theta: float) -> Tensor:
    """Rotary embedding (Su et al. 2021, in Llama's layout) of [M, heads, head_dim] at places [M]."""
    half, exact = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    rates = theta ** (torch.arange(half, device=x.device, dtype=exact) / -half)
    angles = places[:, None, None] * rates  # [M, 1, half]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attend(queries: Tensor, keys: Keys, places: Tensor, own: Sequence[Keys]) -> Tensor:
    """Attention of queries [M, heads, head_dim] at ascending places [M] to the keys [S, KV, head_dim] up to their
    place, and to own: further pairs of each query, [M, KV, head_dim] each. Returns [M, heads, head_dim].

    Own pairs cost a column each, not a mask of (M own)^2. Where there is a gradient, a part of a long sequence is
    computed again in the backward pass, so that memory does not grow with its square.
    """
    size = max(1, SCORES // (queries.shape[1] * max(len(keys[0]), 1)))
    if size >= len(queries):
        return _attend(queries, *keys, places, own)
    parts = []
    for start in range(0, len(queries), size):
        rows = slice(start, start + size)
        part = (queries[rows], *keys, places[rows], [(key[rows], value[rows]) for key, value in own])
        parts.append(checkpoint(_attend, *part, use_reentrant=False) if torch.is_grad_enabled() else _attend(*part))
    return torch.cat(parts)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, places: Tensor, own: Sequence[Keys]) -> Tensor:
    M, (S, KV, width) = len(queries), keys.shape
    G = queries.shape[1] // KV
    grouped = queries.view(M, KV, G, width).permute(1, 0, 2, 3) / math.sqrt(width)  # [KV, M, G, width]
    scores = (grouped.flatten(1, 2) @ keys.permute(1, 2, 0)).view(KV, M, G, S)
    later = torch.arange(S, device=places.device) > places[:, None]  # [M, S]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(later[None, :, None], -torch.inf)
    diagonal = [(grouped * key.transpose(0, 1)[:, :, None]).sum(-1, keepdim=True) for key, _ in own]
    weights = torch.cat([scores, *diagonal], -1).softmax(-1).to(values.dtype)
    mixed = (weights[..., :S].flatten(1, 2) @ values.transpose(0, 1)).view(KV, M, G, width)
    for column, (_, value) in enumerate(own, S):
        mixed = mixed + weights[..., column, None] * value.transpose(0, 1)[:, :, None]
    return mixed.permute(1, 0, 2, 3).flatten(1, 2)

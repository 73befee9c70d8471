"""The attention head beside its formulas with a dense mask, and its three ways through a sequence beside each other."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from spec.heads import LAST, Packed
from spec.heads import eagle3 as module
from spec.heads.eagle3 import Eagle3, Eagle3Config

from . import reference

D, V, L = 12, 23, 4
LAYER = {"heads": 4, "kv_heads": 2, "head_dim": 6, "intermediate_size": 16}
rows_of_masks = st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=4)
read = st.sampled_from([None, (0,), (1, 3)])
chunks = st.sampled_from([1, 40, 10**6])


def config(**changes: Any) -> Eagle3Config:
    return reference.eagle3(LAYER, **{"layers": L, **changes})


def randomized(c: Eagle3Config, seed: int = 0, drafted: int | None = None) -> Eagle3:
    head = Eagle3(c, None if drafted is None else torch.arange(V)[-drafted:])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.4, generator=generator)
    return head.double()


def sequences(c: Eagle3Config, masks: list[list[bool]], seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([flag for row in masks for flag in row], dtype=torch.bool)
    packed = Packed.of(torch.randint(V, mask.shape, generator=generator), mask, map(len, masks), {})
    states = {
        tap: torch.randn(len(packed.starts if tap == LAST else mask), D, generator=generator, dtype=torch.float64)
        for tap in c.taps(L)
    }
    return replace(packed, states=states)


def alone(packed: Packed, row: int) -> Packed:
    start, end = packed.offsets[row : row + 2]
    first, last = packed.bounds[row : row + 2]
    states = {tap: part[first:last] if tap == LAST else part[start:end] for tap, part in packed.states.items()}
    return Packed.of(packed.ids[start:end], packed.mask[start:end], [end - start], states)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def rope(x: Tensor, places: Tensor) -> Tensor:
    """[N, heads, width] at places [N], as complex numbers."""
    half = x.shape[-1] // 2
    angles = places[:, None].double() * 10000.0 ** (-torch.arange(half).double() / half)
    turned = (
        torch.view_as_complex(torch.stack([x[..., :half], x[..., half:]], -1))
        * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.cat([turned.real, turned.imag], -1)


def by_mask(head: Eagle3, packed: Packed, n: int) -> list[Tensor]:
    """By depth the vectors [T, d] of one sequence, over all n T pairs at once and with a dense mask."""
    w, T = head.state_dict(), len(packed.ids)
    g = torch.cat([packed.states[tap] for tap in head.taps[:-1]], -1) @ w["fc.weight"].T
    t = torch.arange(T)
    vectors, pairs, places, found = g, [], [], []
    m = "midlayer."
    for k in range(n):
        tokens = F.pad(packed.ids, (0, k + 1))[t + 1 + k]
        embedded = norm(w["embed_tokens.weight"][tokens], w[m + "input_layernorm.weight"])
        pairs.append(torch.cat([embedded, norm(vectors, w[m + "hidden_norm.weight"])], -1))
        places.append(t + k)
        all_pairs, all_places = torch.cat(pairs), torch.cat(places)
        q, key, value = (
            (x @ w[f"{m}self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, 6))
            for x, name in ((pairs[-1], "q"), (all_pairs, "k"), (all_pairs, "v"))
        )
        q, key = rope(q, t + k), rope(key, all_places)
        depth, begun = torch.arange(k + 1).repeat_interleave(T), t.repeat(k + 1)
        seen = ((depth == 0) & (begun <= t[:, None])) | ((depth > 0) & (begun == t[:, None]))
        scores = torch.einsum("qhw,khw->hqk", q, key.repeat_interleave(2, 1)) / math.sqrt(6)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khw->qhw", weights, value.repeat_interleave(2, 1)).flatten(1)
        vectors = vectors + mixed @ w[m + "self_attn.o_proj.weight"].T
        x = norm(vectors, w[m + "post_attention_layernorm.weight"])
        gate, up, down = (w[f"{m}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        vectors = vectors + (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
        found.append(norm(vectors, w["norm.weight"]))
        vectors = found[-1] if head.config.norm_output else vectors
    return found


@settings(max_examples=40)
@given(masks=rows_of_masks, n=st.integers(1, 4), chunk=chunks, layers=read, normed=st.booleans())
def test_extra_columns_are_a_dense_mask(
    masks: list[list[bool]], n: int, chunk: int, layers: tuple[int, ...] | None, normed: bool
) -> None:
    """Also in parts of any size, and packed as one by one; values and gradients."""
    c = config(n_predict=n, aux_layers=layers, norm_output=normed)
    head, packed = randomized(c), sequences(c, masks)
    rows = [torch.arange(len(packed.starts))] * n
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SCORES", chunk)
        found = head.unroll(packed, rows)
        parameters = [p for name, p in head.named_parameters() if name not in head.borrowed and "lm_head" not in name]
        grads = torch.autograd.grad(sum((v * (k + 1)).sin().sum() for k, v in enumerate(found)), parameters)
    for row, (first, last) in enumerate(pairwise(packed.bounds)):
        one = alone(packed, row)
        for k, wanted in enumerate(by_mask(head, one, n)):
            inside = one.starts + 1 + k < len(one.ids)  # elsewhere it reads what is past the sequence's end
            torch.testing.assert_close(found[k][first:last][inside], wanted[one.starts][inside])
    whole = head.unroll(packed, rows)
    expected = torch.autograd.grad(sum((v * (k + 1)).sin().sum() for k, v in enumerate(whole)), parameters)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)


@settings(max_examples=40)
@given(rows_of_masks, st.integers(1, 5), st.sampled_from([None, 9]), st.integers(0, 99), st.booleans())
def test_drafts_along_a_sequence_are_those_of_a_session(
    masks: list[list[bool]], n: int, drafted: int | None, seed: int, normed: bool
) -> None:
    """Step by step, with drafts of any length in between that are cropped away; and fed back to unroll."""
    c = config(draft_vocab_size=drafted, norm_output=normed)
    head, packed = randomized(c, seed, drafted), sequences(c, masks, seed)
    rows = torch.arange(len(packed.starts))[seed % 3 :: 2]
    if not len(rows):
        return
    along = head.draft_along(packed, rows, n)
    by_start = dict(zip(packed.starts[rows].tolist(), along.tolist(), strict=True))
    generator = torch.Generator().manual_seed(seed)
    for start, end in pairwise(packed.offsets):
        session, at = head.session(), start
        while at < end - 1:
            stop = min(at + int(torch.randint(1, 4, (1,), generator=generator)), end - 1)
            states = {tap: part[at:stop] for tap, part in packed.states.items() if tap != LAST}
            session.extend(states, packed.ids[at + 1 : stop + 1])
            if stop - 1 in by_start:
                assert session.draft(n).tolist() == by_start[stop - 1]
                session.crop()
            at = stop


def test_a_long_sequence_takes_memory_by_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    whole = module._attend

    def counted(queries: Tensor, keys: Tensor, *rest: Any) -> Tensor:
        seen.append(queries.shape[0] * queries.shape[1] * len(keys))
        return whole(queries, keys, *rest)

    monkeypatch.setattr(module, "_attend", counted)
    c = config(n_predict=2)
    head, packed = randomized(c).float(), sequences(c, [[False] * 2048 + [True] * 2048])
    packed = replace(packed, states={tap: states.float() for tap, states in packed.states.items()})
    vectors = head.unroll(packed, [torch.arange(len(packed.starts))] * 2)
    torch.stack(vectors).sum().backward()
    assert max(seen) <= module.SCORES
    assert len(seen) >= 2 * 2 * 8  # in the forward pass, and again in the backward one


@pytest.mark.parametrize("masks", [[], [[False, False]], [[True], [False, True]]])
def test_every_weight_has_a_gradient_whatever_the_batch(masks: list[list[bool]]) -> None:
    """Data-parallel training waits for all of them."""
    head = randomized(config())
    packed = sequences(head.config, masks)
    vectors = head.unroll(packed, [torch.arange(len(packed.starts))] * 3)
    (torch.cat(vectors) @ head.output(0).T).sum().backward()
    assert all(p.grad is not None for name, p in head.named_parameters() if name not in head.borrowed)


def test_layers_that_it_reads() -> None:
    def read(layers: int, **changes: Any) -> list[int | None]:
        return [tap.layer for tap in config(layers=layers, **changes).taps(layers)]

    assert read(30) == [2, 15, 27, None]
    assert read(8) == [2, 4, 5, None]
    assert read(6) == [1, 3, 5, None]
    assert read(2) == [1, None]
    assert read(1) == [0, None]
    assert read(4, aux_layers=(0, 3)) == [0, 3, None]
    for wrong in ((), (2, 1), (1, 1)):
        with pytest.raises(ValueError, match="ascending order without repeats"):
            config(aux_layers=wrong)
    with pytest.raises(ValueError, match=r"the base has the layers 0 to 3, found \[1, 4\]"):
        config(aux_layers=(1, 4)).taps(4)

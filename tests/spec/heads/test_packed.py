"""Sequences end to end and their supervision, next to a reference that looks at one position at a time."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spec.heads import LAST, Packed, supervise

masks = st.lists(st.lists(st.booleans(), max_size=14), max_size=5)


def pack(rows: list[list[bool]]) -> Packed:
    """Of each token its id is 1 + its place, and of each start its state is its place."""
    mask = torch.tensor([flag for row in rows for flag in row], dtype=torch.bool)
    packed = Packed.of(torch.arange(1, len(mask) + 1), mask, map(len, rows), {})
    return replace(packed, states={LAST: packed.starts[:, None].float()})


@settings(max_examples=200)
@given(rows=masks, cut=st.integers(0, 5))
def test_drafts_start_where_the_next_token_is_supervised(rows: list[list[bool]], cut: int) -> None:
    packed = pack(rows)
    bounds = zip(packed.offsets, rows, strict=False)
    assert packed.starts.tolist() == [o + t for o, row in bounds for t in range(len(row) - 1) if row[t + 1]]
    assert packed.bounds == tuple(int((packed.starts < offset).sum()) for offset in packed.offsets)
    joined = Packed.join([pack(rows[:cut]), pack(rows[cut:])])
    assert joined.offsets == packed.offsets
    assert torch.equal(joined.starts, packed.starts)


@settings(max_examples=200)
@given(rows=masks, n=st.integers(1, 4), drafted=st.booleans(), taught=st.booleans())
def test_supervision_is_that_of_each_position(rows: list[list[bool]], n: int, drafted: bool, taught: bool) -> None:
    packed = pack(rows)
    index = torch.arange(100).where(torch.arange(100) % 3 > 0, -1) if drafted else None
    found = supervise(packed, n, index, taught=taught)
    wanted, writers = [], set()
    ends = {t: stop for o, stop in zip(packed.offsets, packed.offsets[1:], strict=False) for t in range(o, stop)}
    counts = [0] * n
    for row, t in enumerate(packed.starts.tolist()):
        for k in range(n):
            if t + 2 + k < ends[t] and packed.mask[t + 1 : t + 3 + k].all():
                counts[k] += 1
                target = int(packed.ids[t + 2 + k])
                if index is not None:
                    target = int(index[target])
                if taught or target >= 0:
                    wanted.append((k, row, target))
                    writers.add(row + 1 + k)
    real = zip(found.depths.tolist(), found.rows.tolist(), found.targets.tolist(), strict=True)
    assert [entry for entry in real if entry[0] < n] == sorted(wanted)
    assert found.counts.tolist() == counts
    assert sum(found.sizes) == len(found.rows)
    assert found.positions == len(packed.starts)
    assert found.taught.tolist() == (sorted(writers) if taught else [])
    if taught:  # each depth has the same writers, in order: its draft began 1 + k rows above
        assert found.sizes == [len(writers)] * n
        for k, (part, depths) in enumerate(zip(found.rows.view(n, -1), found.depths.view(n, -1), strict=True)):
            assert torch.equal((part + 1 + k)[depths < n], found.taught[depths < n])

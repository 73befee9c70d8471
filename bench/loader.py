"""How fast do cached positions come? `python -m bench.loader`, after `make repro`.

The same sequences, shuffled, as batches of positions: from the store's reader, from a file a sample (safetensors and
torch.save, the field's usual forms) and from a raw memory map, each behind the same prefetching thread.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from bench.common import default_config, machine, parts_of, real_states, seconds, table
from spec.corpus import TokenSequence
from spec.heads import LAST, Packed, Tap
from spec.store import codecs, features, identity
from spec.store.codecs import CODECS
from spec.store.collection import Collection
from spec.store.manifest import Manifest, make_manifest
from spec.store.reader import FeatureReader, prefetch

SEQUENCES, LENGTH, PROMPT, BATCH = 2400, 400, 100, 16
ROUNDS = 3
WIDE = 4096
OPERATIONS = 6 * 3 * (128256 * WIDE + WIDE**2)
"""Of a position's training step, with three heads as wide as an 8B base (SumRnn.operations, forward and backward)."""
H100_FLOPS = 400e12


def main() -> None:
    config = default_config()
    print(machine())
    states = real_states(config, SEQUENCES * (LENGTH - PROMPT))
    d = states.shape[1]
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 49152, (SEQUENCES, LENGTH), np.int32)
    mask = np.zeros(LENGTH, np.uint8)
    mask[PROMPT:] = 1
    per_row = LENGTH - PROMPT
    print(f"{SEQUENCES} sequences, {len(states):,} positions, {states.nbytes / 1e6:,.0f} MB of states, {BATCH} a batch")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=".") as folder:
        root = Path(folder)
        forms: dict[str, Callable[[int], Iterator[Packed]]] = {}
        for codec in ("zstd", "none", "fp8"):
            manifest = store(root / codec, {LAST: states}, ids, mask, 49152, codec)
            forms[f"reader, {codec}, first epoch"] = from_reader(manifest, root / codec, fresh=True)
            forms[f"reader, {codec}, later epochs"] = from_reader(manifest, root / codec, fresh=False)
        for form, save, load in (
            ("safetensors a sample", save_file, load_file),
            ("torch.save a sample", torch.save, lambda path: torch.load(path, weights_only=True)),
        ):
            target = root / form.replace(" ", "-")
            target.mkdir()
            for row in range(SEQUENCES):
                part = states[row * per_row : (row + 1) * per_row].clone()
                held = {"states": part, "ids": torch.from_numpy(ids[row]), "mask": torch.from_numpy(mask)}
                save(held, target / f"{row}.bin")
            forms[form] = from_files(target, load)
        forms["raw memory map"] = from_map(root / "raw.bin", states, ids, mask)

        rates: dict[str, list[float]] = {form: [] for form in forms}
        for turn in range(ROUNDS):
            for form, epoch in forms.items():
                rates[form].append(len(states) / seconds(partial(positions_in, epoch, turn)))
    medians = {form: statistics.median(found) for form, found in rates.items()}
    raw, needed = medians["raw memory map"], H100_FLOPS / OPERATIONS * WIDE * 2
    table(
        ["form", "positions/s", "MB/s", "x raw map", "x what an H100 needs (8B base)"],
        [
            [form, f"{rate:,.0f}", f"{rate * d * 2 / 1e6:,.0f}", f"{rate / raw:.2f}", f"{rate * d * 2 / needed:.1f}"]
            for form, rate in medians.items()
        ],
    )
    print(
        f"An H100 at {H100_FLOPS / 1e12:.0f} TFLOP/s trains sum_rnn n=3, h=4096, V=128,256 at "
        f"{H100_FLOPS / OPERATIONS:,.0f} positions/s: {needed / 1e6:,.0f} MB/s of bf16 states (docs/scaling.md)"
    )


def positions_in(epoch: Callable[[int], Iterator[Packed]], number: int) -> int:
    return sum(len(batch.starts) for batch in prefetch(epoch(number)))


def store(
    root: Path,
    states: Mapping[Tap, torch.Tensor],
    ids: np.ndarray[Any, Any],
    mask: np.ndarray[Any, Any],
    vocab_size: int,
    codec: str,
    segment_tokens: int = 65536,
) -> Manifest:
    """Sequences in a store of their own: each tap's vectors [N * P, d] in bfloat16, LAST first; ids [N, T], and the
    mask [T] of each."""
    base = {"weights": "w", "tokenizer": "t"}
    width = states[LAST].shape[1]
    attributes = {"dtype": "bfloat16", "width": width, "offsets": features.offsets(CODECS[codec])}
    count, length = ids.shape
    a_segment, collections = max(segment_tokens // length, 1), []
    for tap, vectors in states.items():
        content = identity.states(base, "bfloat16", tap, CODECS[codec], "bfloat16")
        collections.append(Collection(root, "states", content))
        collections[-1].create()
        by_row = vectors.view(count, -1, width)
        for start in range(0, count, a_segment):
            numbers = range(start, min(start + a_segment, count))
            rows = []
            for row in numbers:
                encoded = CODECS[codec].encode(by_row[row])
                rows.append({**{k: codecs.to_numpy(v) for k, v in encoded.items()}, "ids": ids[row], "mask": mask})
            claim = collections[-1].claim([str(row) for row in numbers])
            assert claim is not None
            claim.commit(rows, attributes, CODECS[codec])
    return make_manifest(
        collections,
        [str(row) for row in range(count)],
        [TokenSequence(row, mask, "a", int(np.argmax(mask))) for row in ids],
        base={"name": "bench", "revision": None, **base},
        dtype="bfloat16",
        hidden_size=width,
        vocab_size=vocab_size,
        layers=1,
        greedy=True,
    )


def shuffled(epoch: int) -> list[Sequence[int]]:
    return parts_of([int(i) for i in np.random.default_rng(epoch).permutation(SEQUENCES)], BATCH)


def from_reader(manifest: Manifest, root: Path, fresh: bool) -> Callable[[int], Iterator[Packed]]:
    kept = FeatureReader(manifest, root)

    def epoch(number: int) -> Iterator[Packed]:
        found = FeatureReader(manifest, root) if fresh else kept
        return found.batches(parts_of(found.order(0, number), BATCH))

    if not fresh:  # decoded once before it is timed
        positions_in(epoch, 0)
    return epoch


def from_files(folder: Path, load: Callable[[Path], Any]) -> Callable[[int], Iterator[Packed]]:
    def sequence(row: int) -> Packed:
        found = load(folder / f"{row}.bin")
        return packed(found["ids"], found["mask"], found["states"])

    def epoch(number: int) -> Iterator[Packed]:
        for part in shuffled(number):
            yield Packed.join([sequence(row) for row in part])

    return epoch


def packed(ids: torch.Tensor, mask: torch.Tensor, states: torch.Tensor) -> Packed:
    return Packed.of(ids.long(), mask != 0, [len(ids)], {LAST: states})


def from_map(
    path: Path, states: torch.Tensor, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]
) -> Callable[[int], Iterator[Packed]]:
    """The best case: states as they are in one file, tokens in memory, no checksum."""
    codecs.to_numpy(states).tofile(path)
    mapped = torch.from_numpy(np.memmap(path, np.uint16, "r+", shape=tuple(states.shape))).view(torch.bfloat16)
    per_row, tokens, supervised = LENGTH - PROMPT, torch.from_numpy(ids), torch.from_numpy(mask)

    def epoch(number: int) -> Iterator[Packed]:
        for part in shuffled(number):
            rows = (packed(tokens[row], supervised, mapped[row * per_row : (row + 1) * per_row]) for row in part)
            yield Packed.join(list(rows))

    return epoch


if __name__ == "__main__":
    main()

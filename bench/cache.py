"""Does storing hold up the base? `python -m bench.cache`, after `make repro`.

1. The cache stage's tokens/s over the bare forward on the same batches, in turn, on the real base.
2. A synthetic base that emits real states at 500 MB/s: what the store writes, compressed, hashed and flushed.
3. Size and speed of each codec on real states, and what it does to acceptance.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from bench.common import default_config, load_base, machine, parts_of, reader, real_states, seconds, spread, table
from spec import acceptance, base, corpus, heads
from spec.base import Base
from spec.config import Config
from spec.device import synchronize
from spec.heads import LAST, Packed
from spec.store import codecs, features, segment
from spec.store.codecs import CODECS, Codec
from spec.store.collection import Collection
from spec.store.features import FeatureRow, Group, TapStore
from spec.store.reader import FeatureReader
from stages import common

ROUNDS = 5
TOKENS = 16384
SOURCE_RATE = 500e6


def main() -> None:
    config = default_config()
    print(machine())
    with tempfile.TemporaryDirectory(prefix="bench-", dir=".") as folder:
        beside_the_forward(config, Path(folder))
        synthetic(config, Path(folder))
        compare_codecs(config, Path(folder))


def beside_the_forward(config: Config, root: Path) -> None:
    rows, total = [], 0
    for row in corpus.read(common.responses_path("train")):
        if total < TOKENS:
            rows.append(FeatureRow.of(row))
            total += len(row)
    groups = features.plan(rows, [()], 4096)
    cache_rates, bare_rates = cached_and_bare(load_base(config), rows, groups, root, ROUNDS)
    ratios = [cached / bare for cached, bare in zip(cache_rates, bare_rates, strict=True)]
    cache_rate, bare_rate = (f"{statistics.median(rates):,.0f}" for rates in (cache_rates, bare_rates))
    print(f"\n1. {len(rows)} sequences, {total:,} tokens in {len(groups)} segments")
    table(
        ["", "tokens/s", "ratio: median (lowest to highest)"],
        [["bare forward", bare_rate, ""], ["cache, zstd", cache_rate, spread(ratios)]],
    )


def cached_and_bare(
    model: Base, rows: Sequence[FeatureRow], groups: Sequence[Group], root: Path, rounds: int
) -> tuple[list[float], list[float]]:
    """Tokens/s of the cache stage's work and of the bare forward on the same batches, in turn; one of each a round."""
    batches = list(_padded(rows, groups))
    total = sum(len(row.ids) for row in rows)

    @torch.inference_mode()
    def bare() -> None:
        for batch in batches:
            base.hidden_states(model.model, batch.to(model.device))
        synchronize(model.device)

    def cached() -> None:
        features.produce(model, [store_in(root / "cached", codecs.ZSTD)], rows, groups)

    rates: dict[Callable[[], None], list[float]] = {cached: [], bare: []}
    for turn in range(rounds + 1):
        for work in (bare, cached) if turn % 2 else (cached, bare):
            rates[work].append(total / seconds(work))
            shutil.rmtree(root / "cached", ignore_errors=True)
    return rates[cached][1:], rates[bare][1:]  # first calls pay for allocations and code paths


def store_in(root: Path, codec: Codec) -> TapStore:
    """A store of its own for the last states."""
    collection = Collection(root, "states", {"codec": codec.name})
    collection.create()
    return TapStore(LAST, codec, collection)


def _padded(rows: Sequence[FeatureRow], groups: Sequence[Group]) -> list[torch.Tensor]:
    """The very batches that produce makes."""
    batches = []
    for numbers, _ in groups:
        width = base.bucket(max(len(rows[r].ids) for r in numbers))
        for part in parts_of(numbers, max(1, features.BATCH_TOKENS // width)):
            ids = torch.zeros(len(part), width, dtype=torch.long)
            for number, r in enumerate(part):
                ids[number, : len(rows[r].ids)] = torch.from_numpy(rows[r].ids)
            batches.append(ids)
    return batches


class Source(nn.Module):
    """A model that hands out real states at SOURCE_RATE, as a device does: it works on while the host handles what
    it gave, but never more than one batch ahead."""

    config = SimpleNamespace(get_text_config=SimpleNamespace)
    dtype = torch.bfloat16

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states, self.due = states, 0.0

    def get_decoder(self) -> Source:
        return self

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        B, S = input_ids.shape
        size = B * S * self.states.shape[1] * 2
        now, takes = time.perf_counter(), size / SOURCE_RATE
        self.due = max(self.due, now - takes) + takes
        time.sleep(max(0.0, self.due - now))
        return SimpleNamespace(last_hidden_state=self.states[: B * S].view(B, S, -1))


def synthetic(config: Config, root: Path) -> None:
    length, count = 512, 1600  # 818,000 positions: 940 MB at d=576
    model = Base(Source(real_states(config, features.BATCH_TOKENS)), None, "", torch.device("cpu"), Source.dtype)
    vars(model)["limits"] = base.Limits(None, False, 49152, False, True)
    generator = np.random.default_rng(0)
    mask = np.ones(length, np.uint8)
    rows = [FeatureRow(str(i), generator.integers(0, 49152, length, np.int32), mask) for i in range(count)]
    groups = features.plan(rows, [()], config.features.segment_tokens)
    size = count * (length - 1) * model.model.states.shape[1] * 2
    result = []
    torch.set_num_threads(1)  # the host of a device computes nothing
    for codec in CODECS.values():
        rates = []
        for _ in range(3):
            store = store_in(root, codec)
            rates.append(size / 1e6 / seconds(partial(features.produce, model, [store], rows, groups)))
            shutil.rmtree(store.collection.folder)
        result.append([codec.name, f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}"])
    print(f"\n2. A source of {SOURCE_RATE / 1e6:.0f} MB/s, {size / 1e6:,.0f} MB of real states, {len(groups)} segments")
    table(["codec", "MB/s of states stored: median", "lowest to highest"], result)


def compare_codecs(config: Config, root: Path) -> None:
    states = real_states(config, 60_000)
    megabytes, held = states.nbytes / 1e6, reader(config, "eval")
    speculator = heads.load(common.MODEL)
    result = []
    for codec in CODECS.values():
        row = {name: codecs.to_numpy(tensor) for name, tensor in codec.encode(states).items()}
        attributes = {"offsets": dict.fromkeys(row, "offsets")}
        writes, reads = [], []
        for number in range(5):
            name = f"{codec.name}{number}"
            writes.append(seconds(partial(segment.write, root, name, ["a"], [row], attributes, codec)))
            reads.append(seconds(partial(segment.read, root, name)))
        stored = segment.read_record(root, f"{codec.name}0").size / states.nbytes
        speeds = [f"{megabytes / statistics.median(times):,.0f}" for times in (writes, reads)]
        recoded = Recoded(held.manifest, held.root)
        recoded.codec = codec
        walks = acceptance.walks(recoded, acceptance.draft_answers(speculator, recoded))
        result.append([codec.name, f"{stored:.3f}", *speeds, f"{acceptance.tokens_per_step(walks):.4f}"])
    print(f"\n3. {megabytes:.0f} MB of real states; the default's head, walked over eval")
    table(["codec", "size / (2 d a position)", "write MB/s", "read MB/s", "tokens per step"], result)


class Recoded(FeatureReader):
    """A reader whose states went through a codec."""

    codec: Codec

    def sequences(self, indices: Iterable[int]) -> Iterator[tuple[int, Packed]]:
        for index, packed in super().sequences(indices):
            encoded = self.codec.encode(packed.states[LAST])
            arrays = {name: codecs.to_numpy(tensor) for name, tensor in encoded.items()}
            yield index, replace(packed, states={LAST: self.codec.decode(arrays, self.dtype)})


if __name__ == "__main__":
    main()

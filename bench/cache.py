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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from bench.common import default_config, load_base, machine, reader, real_states, seconds, spread, table
from spec import acceptance, base, corpus, heads
from spec.base import Base
from spec.config import Config
from spec.device import synchronize
from spec.heads import LAST
from spec.store import codecs, features, segment
from spec.store.codecs import CODECS, Codec
from spec.store.collection import Collection
from spec.store.features import FeatureRow, TapStore
from spec.store.plan import plan_groups
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
    groups = plan_groups([row.key for row in rows], [len(row.ids) for row in rows], (), base.bucket, 4096)
    cache_rates, bare_rates = cached_and_bare(load_base(config), rows, groups, root, ROUNDS)
    ratios = [cached / bare for cached, bare in zip(cache_rates, bare_rates, strict=True)]
    cache_rate, bare_rate = statistics.median(cache_rates), statistics.median(bare_rates)
    print(f"\n1. {len(rows)} sequences, {total:,} tokens in {len(groups)} segments")
    table(
        ["", "tokens/s", "ratio: median (lowest to highest)"],
        [["bare forward", f"{bare_rate:,.0f}", ""], ["cache, zstd", f"{cache_rate:,.0f}", spread(ratios)]],
    )


def cached_and_bare(
    model: Base, rows: Sequence[FeatureRow], groups: Sequence[Sequence[int]], root: Path, rounds: int
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
        features.produce(model, [store_in(root / "cached", codecs.ZSTD)], rows, [(group, (0,)) for group in groups])

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


def _padded(rows: Sequence[FeatureRow], groups: Sequence[Sequence[int]]) -> Sequence[torch.Tensor]:
    """The very batches that produce makes."""
    batches = []
    for group in groups:
        width = base.bucket(max(len(rows[r].ids) for r in group))
        size = max(1, features.BATCH_TOKENS // width)
        for start in range(0, len(group), size):
            ids = np.zeros((len(group[start : start + size]), width), np.int64)
            for number, r in enumerate(group[start : start + size]):
                ids[number, : len(rows[r].ids)] = rows[r].ids
            batches.append(torch.from_numpy(ids))
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
    width, length, count = 512, 512, 1600  # 818,000 positions: 940 MB at d=576
    model = Base(Source(real_states(config, features.BATCH_TOKENS)), None, "", torch.device("cpu"), Source.dtype)
    vars(model)["limits"] = base.Limits(None, False, 49152, False, True)
    generator = np.random.default_rng(0)
    mask = np.ones(length, np.uint8)
    rows = [FeatureRow(str(i), generator.integers(0, 49152, length, np.int32), mask) for i in range(count)]
    groups = plan_groups(
        [row.key for row in rows], [length] * count, (), lambda _: width, config.features.segment_tokens
    )
    size = count * (length - 1) * model.model.states.shape[1] * 2
    result = []
    torch.set_num_threads(1)  # the host of a device computes nothing
    for codec in CODECS.values():
        rates = []
        for _ in range(3):
            store = store_in(root, codec)
            took = seconds(partial(features.produce, model, [store], rows, [(group, (0,)) for group in groups]))
            rates.append(size / 1e6 / took)
            shutil.rmtree(store.collection.folder)
        result.append([codec.name, f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}"])
    print(f"\n2. A source of {SOURCE_RATE / 1e6:.0f} MB/s, {size / 1e6:,.0f} MB of real states, {len(groups)} segments")
    table(["codec", "MB/s of states stored: median", "lowest to highest"], result)


def compare_codecs(config: Config, root: Path) -> None:
    states = real_states(config, 60_000)
    eval_reader = reader(config, "eval")
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
        stored = segment.read_record(root, f"{codec.name}0").size
        walks = _walk_through(speculator, eval_reader, codec)
        result.append(
            [
                codec.name,
                f"{stored / states.nbytes:.3f}",
                f"{states.nbytes / 1e6 / statistics.median(writes):,.0f}",
                f"{states.nbytes / 1e6 / statistics.median(reads):,.0f}",
                f"{acceptance.tokens_per_step(walks):.4f}",
            ]
        )
    print(f"\n3. {states.nbytes / 1e6:.0f} MB of real states; the default's head, walked over eval")
    table(["codec", "size / (2 d a position)", "write MB/s", "read MB/s", "tokens per step"], result)


def _walk_through(speculator: heads.Speculator, found: object, codec: Codec) -> list[acceptance.Walk]:
    """The exact walk with states that were encoded and decoded."""
    split = _Recoded(found, codec)
    return acceptance.walks(split, acceptance.draft_answers(speculator, split), acceptance.head_drafts)  # type: ignore[arg-type]


class _Recoded:
    """A reader whose states went through a codec."""

    def __init__(self, found: object, codec: Codec) -> None:
        self._found, self._codec = found, codec

    def __getattr__(self, name: str) -> object:
        return getattr(self._found, name)

    def __len__(self) -> int:
        return len(self._found)  # type: ignore[arg-type]

    def sequences(self, indices: Sequence[int]) -> object:
        for index, sequence in self._found.sequences(indices):  # type: ignore[attr-defined]
            encoded = self._codec.encode(sequence.states)
            arrays = {name: codecs.to_numpy(tensor) for name, tensor in encoded.items()}
            states = self._codec.decode(arrays, sequence.states.dtype)
            yield index, type(sequence)(states, sequence.positions, sequence.ids, sequence.mask)


if __name__ == "__main__":
    main()

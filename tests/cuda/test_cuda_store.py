"""A store that the device writes: it holds the base's states, passes its own checks, and heads train from it."""

from pathlib import Path

import pytest
import torch

from spec import base as base_model
from spec.base import Base, Teacher
from spec.config import Model
from spec.heads import LAST
from spec.store import features, identity, tables
from spec.store.codecs import CODECS
from spec.store.collection import Collection
from spec.store.features import FeatureRow, TapStore
from spec.store.manifest import Manifest, make_manifest
from spec.store.reader import FeatureReader
from spec.training.frozen import FrozenTask
from spec.workers import Worker
from tests.spec.training.runs import make_config, make_speculator
from tests.tiny import chain

BASE = {"name": "tiny", "revision": None, "weights": "w", "tokenizer": "t"}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(base_folder: Path, device: torch.device, request: pytest.FixtureRequest) -> Base:
    return base_model.load(Model(), base_folder, "digest", device, request.param)


def cached(root: Path, model: Base, codec: str) -> Manifest:
    """The states of forty sequences, as the cache stage stores them."""
    rows = chain(40, 290, longest=120)
    keyed = list(map(FeatureRow.of, rows))
    dtype, made = str(model.dtype).removeprefix("torch."), CODECS[codec]
    collection = Collection(root, "states", identity.states(BASE, dtype, LAST, made, dtype))
    kept = tables.collection(root, BASE, dtype)
    for each in (collection, kept):
        each.create()
    tables.save(model, kept, [row.ids for row in rows])
    features.produce(model, [TapStore(LAST, made, collection)], keyed, features.plan(keyed, [()], 1024))
    return make_manifest([collection], [row.key for row in keyed], rows, base=BASE, **tables.shape(kept), greedy=False)


@pytest.mark.parametrize("codec", ["none", "zstd", "fp8"])
def test_what_the_device_writes_is_whole_and_right(codec: str, model: Base, tmp_path: Path) -> None:
    manifest = cached(tmp_path, model, codec)
    whole, damaged = manifest.last.collection(tmp_path).survey()
    assert whole
    assert not damaged
    reader = FeatureReader(manifest, tmp_path)
    exact = {torch.float32: 1e-3, torch.bfloat16: 0.05}[model.dtype] if codec != "fp8" else 0.1
    for _, packed in reader.sequences(range(0, 40, 7)):
        expected = base_model.hidden_states(model.model, packed.ids[None].to(model.device))[0].cpu().float()
        expected = expected[packed.starts]
        difference = (packed.states[LAST].float() - expected).norm() / expected.norm()
        assert difference < exact, difference


def test_heads_train_from_it(model: Base, tmp_path: Path, worker: Worker) -> None:
    manifest = cached(tmp_path, model, "zstd")
    reader = FeatureReader(manifest, tmp_path)
    shape = {"hidden_size": manifest.hidden_size, "vocab_size": manifest.vocab_size}
    speculator = make_speculator(**shape).to(worker.device)
    config = make_config(optim={"lr": 0.01, "loss": "kl"})
    teacher = Teacher(tables.Tables(reader.tables)["lm_head"])
    task = FrozenTask(config, speculator, reader, reader, worker, teacher)
    optimizer = torch.optim.AdamW(task.parameters(), fused=True)
    losses = []
    for batch in task.batches(iter([task.order(0)[:8]] * 12)):
        moved = batch.to(worker.device)
        loss, _ = task.module(moved, moved.counts.to(worker.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]

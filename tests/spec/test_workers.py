"""Workers; training/test_loop.py shows several of them."""

import pytest
import torch

from spec.workers import Worker, joined, this_worker
from tests.tiny import with_instructions


def test_alone_without_a_launcher() -> None:
    worker = this_worker()
    assert (worker.rank, worker.world, worker.first) == (0, 1, True)
    assert worker.sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert worker.gather("x") == ["x"]
    with joined() as same:
        assert same == worker
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("dtype", "instructions", "device", "mixed"),
    [
        ("bfloat16", ["avx512_bf16"], "cpu", True),
        ("float32", ["avx512_bf16"], "cpu", False),
        ("float16", ["avx512_bf16"], "cpu", True),
        ("bfloat16", ["avx2"], "cpu", False),
        ("bfloat16", [], "cuda", True),
    ],
)
def test_training_is_mixed_where_the_device_has_bfloat16(
    dtype: str, instructions: list[str], device: str, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_instructions(monkeypatch, *instructions)
    assert Worker(0, 1, torch.device(device)).mixed(dtype) is mixed

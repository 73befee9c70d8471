from __future__ import annotations

import torch

from spec.device import fetch, mark, send, synchronize


def test_what_is_sent_and_fetched_is_the_same(device: torch.device) -> None:
    numbers = torch.arange(1000)
    there = send(numbers, device)
    assert there.device == device
    assert torch.equal(fetch(there * 2)(), numbers * 2)


def test_the_device_is_done_after_it_was_waited_for(device: torch.device) -> None:
    matrix = torch.randn(2048, 2048, device=device)
    for _ in range(20):
        matrix = matrix @ matrix / 2048
    done = mark(device)
    synchronize(device)
    assert done()

"""Which device this process computes on, and in which arithmetic."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
"""What torch.cpu.get_capabilities calls the instructions of x86 and Arm for these numbers."""


def choose_device() -> torch.device:
    """CUDA (the device of this worker's LOCAL_RANK), else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def arithmetic(dtype: str, device: torch.device) -> torch.dtype:
    """What numbers of a dtype are computed in on a device: in that dtype, but in float32 on a CPU that lacks the
    instructions for it, where matrix products would take several times as long (docs/scaling.md). What is stored keeps
    its dtype."""
    given: torch.dtype = getattr(torch, dtype)
    if device.type != "cpu" or given not in _INSTRUCTIONS:
        return given
    found = torch.cpu.get_capabilities()
    return given if any(found.get(name) for name in _INSTRUCTIONS[given]) else torch.float32


def on_this_device(work: Callable[P, T]) -> Callable[P, T]:
    """The function, made ready to run on another thread: each has a current CUDA device of its own, which is the
    first one until it is set, and every worker of a machine would hold memory there."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return work
    device = torch.cuda.current_device()

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        torch.cuda.set_device(device)
        return work(*args, **kwargs)

    return run


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; to CUDA through page-locked memory, so that nobody waits for the copy."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the CPU; the function that is returned waits for this copy, and for nothing later."""
    if tensor.device.type != "cuda":
        here = tensor.cpu()
        return lambda: here
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        arrived.synchronize()
        return copy

    return wait


def mark(device: torch.device) -> Callable[[], bool]:
    """The function that is returned says whether the device has done all that it was asked to do until now."""
    if device.type != "cuda":
        return lambda: True
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(device))
    query: Callable[[], bool] = done.query
    return query


def synchronize(device: torch.device) -> None:
    """Wait until a device has done everything that it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

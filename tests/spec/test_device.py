import os
import subprocess
import sys
import threading

import pytest
import torch

from spec import device as device_module
from spec.device import on_this_device
from tests.tiny import with_instructions


@pytest.mark.parametrize(
    ("instructions", "dtype", "device", "expected"),
    [
        (["avx2", "avx512_f"], "bfloat16", "cpu", torch.float32),
        (["avx2", "avx512_bf16"], "bfloat16", "cpu", torch.bfloat16),
        (["amx_bf16"], "bfloat16", "cpu", torch.bfloat16),
        (["neon", "bf16"], "bfloat16", "cpu", torch.bfloat16),
        (["avx512_bf16"], "float16", "cpu", torch.float32),
        (["avx512_fp16"], "float16", "cpu", torch.float16),
        (["avx512_bf16"], "float32", "cpu", torch.float32),
        ([], "bfloat16", "cuda", torch.bfloat16),
        ([], "float16", "mps", torch.float16),
    ],
)
def test_arithmetic_is_what_the_device_has(
    instructions: list[str], dtype: str, device: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_instructions(monkeypatch, *instructions)
    assert device_module.arithmetic(dtype, torch.device(device)) == expected


def test_every_name_of_an_instruction_is_one_that_torch_knows() -> None:
    known = set(torch.cpu.get_capabilities())
    if "avx2" in known:
        assert {"avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16"} <= known
    else:
        assert {"bf16", "fp16_arith"} <= known


def test_a_thread_works_on_the_device_of_the_thread_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_this_device(len)("abc") == 3  # without CUDA nothing is asked of it
    current = threading.local()  # as CUDA has it: each thread begins on the first device
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "device", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", device))
    torch.cuda.set_device(3)
    found: list[int] = []
    thread = threading.Thread(target=on_this_device(lambda: found.append(torch.cuda.current_device())))
    thread.start()
    thread.join()
    assert found == [3]


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
@pytest.mark.parametrize("package", ["spec", "stages", "bench"])
def test_how_threads_wait_is_said_before_torch_is_imported(package: str, given: dict[str, str], found: str) -> None:
    bare = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = f"import os, sys, {package}; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], env=bare | given, check=True, stdout=-1, text=True).stdout
    assert said.split() == [found, "False"]

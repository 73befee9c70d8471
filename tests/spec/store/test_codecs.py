"""What is stored of a state: all of it, or an 8-bit float whose error has a bound."""

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from spec.store.codecs import FP8, NONE, from_numpy, to_numpy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MANTISSA = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}

numbers = st.one_of(
    st.floats(-100, 100, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, 448.0, 2.0**-9, 6e4, 1e-20, 1e-38, 1e-42, 3e38]),
)
states = arrays.arrays(np.float32, st.tuples(st.integers(0, 6), st.integers(1, 9)), elements=numbers)


def stored(tensors: dict[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    return {key: to_numpy(tensor) for key, tensor in tensors.items()}


@given(states=states, dtype=st.sampled_from(DTYPES))
def test_exact_states_come_back_bit_for_bit(states: NDArray[np.float32], dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(states).to(dtype)
    kept = stored(NONE.encode(tensor))
    assert list(kept) == ["states"]
    assert kept["states"].dtype == (np.float32 if dtype == torch.float32 else np.uint16)
    back = NONE.decode(kept, dtype)
    assert back.dtype == dtype
    assert to_numpy(back).tobytes() == kept["states"].tobytes() == to_numpy(tensor).tobytes()


@settings(max_examples=300)
@given(states=states, dtype=st.sampled_from(DTYPES))
def test_the_error_of_fp8_has_a_bound(states: NDArray[np.float32], dtype: torch.dtype) -> None:
    """e4m3 has 3 bits behind the point: half a unit in the last place is 2**-4 of a normal number, and 2**-10 of the
    scale for the subnormal ones. The scale maps a position's largest number to 448. The rest is rounding: of the
    scale, of the quotient and of the result in its own dtype."""
    limit = torch.finfo(dtype).max
    exact = torch.from_numpy(states).clamp(-limit, limit).to(dtype)
    back = FP8.decode(stored(FP8.encode(exact)), dtype)
    assert back.dtype == dtype
    assert back.isfinite().all()
    wanted, found = exact.double(), back.double()
    scales = (wanted.abs().amax(1, keepdim=True) / 448).clamp(min=2.0**-126)
    rounding = 2.0 ** -(MANTISSA[dtype] + 1) * wanted.abs() * 1.07 + 2.0**-24 * wanted.abs()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bound = torch.maximum(2.0**-4 * wanted.abs(), 2.0**-10 * scales) * (1 + 2.0**-20) + rounding + smallest
    assert ((wanted - found).abs() <= bound).all()


def test_arrays_of_every_dtype_go_to_numpy_and_back_without_a_copy() -> None:
    for dtype in [*DTYPES, torch.float8_e4m3fn, torch.uint8, torch.int32, torch.int64]:
        tensor = torch.tensor([[1, 2], [3, 4]]).to(dtype)
        back = from_numpy(to_numpy(tensor), dtype)
        assert back.dtype == dtype
        assert back.data_ptr() == tensor.data_ptr()
        assert back.tolist() == [[1, 2], [3, 4]]

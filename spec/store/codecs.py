"""How arrays are encoded and compressed.

Lossless codecs change no bit: `none`, and `zstd` over byte planes (the high bytes of bf16 numbers, which hold sign and
exponent, compress well; the low ones hardly). `fp8` is lossy: an 8-bit float (e4m3) for each number and a scale for
each position.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numcodecs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.codecs.numcodecs import Shuffle

warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3 specification")

_FP8_MAX = 448.0  # the largest finite e4m3 number
_LEVEL = 1  # of zstd


@dataclass(frozen=True)
class Codec:
    """How vectors are stored."""

    name: str  # as features.codec and features.layer_codec have it
    rounds: bool  # whether numbers become float8_e4m3fn with a float32 scale a position; else every bit is kept
    compresses: bool

    @property
    def encoding(self) -> str:
        """What it makes of the numbers: vectors of different encodings are never mixed."""
        return "fp8 e4m3 with a float32 scale a position" if self.rounds else "exact"

    def position_bytes(self, width: int, dtype: str) -> int:
        """What a position takes before compression, in bytes."""
        return width + 4 if self.rounds else width * (4 if dtype == "float32" else 2)

    def encode(self, states: Tensor) -> dict[str, Tensor]:
        """Finite vectors [P, width] as the tensors that are stored: `states` and, where it rounds, `scales` [P]."""
        if not self.rounds:
            return {"states": states}
        exact = states.float()
        # A scale of 0 would make 0 / 0 of a state of zeros.
        scales = (exact.abs().amax(1) / _FP8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
        return {"states": (exact / scales[:, None]).to(torch.float8_e4m3fn), "scales": scales}

    def decode(self, arrays: Mapping[str, NDArray[Any]], dtype: torch.dtype) -> Tensor:
        """What encode stored, [P, width] in the vectors' dtype."""
        if not self.rounds:
            return from_numpy(arrays["states"], dtype)
        numbers = from_numpy(arrays["states"], torch.float8_e4m3fn).to(dtype)
        return numbers.mul_(torch.from_numpy(arrays["scales"]).to(torch.float32)[:, None])

    def compress(self, content: NDArray[Any]) -> bytes:
        """The bytes of a little-endian chunk, as `compressors` would make them but for the crc32c."""
        if not self.compresses:
            return content.tobytes()
        planes = numcodecs.Shuffle(content.itemsize).encode(content) if content.itemsize > 1 else content
        return bytes(numcodecs.Zstd(_LEVEL).encode(planes))

    def compressors(self, dtype: np.dtype[Any]) -> list[Any]:
        """Zarr's bytes-to-bytes codecs for an array of this dtype; the last one is a crc32c of each chunk."""
        if not self.compresses:
            return [Crc32cCodec()]
        planes = [Shuffle(elementsize=dtype.itemsize)] if dtype.itemsize > 1 else []
        return [*planes, ZstdCodec(level=_LEVEL), Crc32cCodec()]


NONE = Codec("none", rounds=False, compresses=False)
ZSTD = Codec("zstd", rounds=False, compresses=True)
FP8 = Codec("fp8", rounds=True, compresses=True)
CODECS = {codec.name: codec for codec in (NONE, ZSTD, FP8)}


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """A tensor on the CPU as an array that Zarr can hold: 16-bit floats as uint16 bits, 8-bit ones as uint8."""
    bits = {1: torch.uint8, 2: torch.uint16}.get(tensor.dtype.itemsize) if tensor.is_floating_point() else None
    array: NDArray[Any] = (tensor if bits is None else tensor.view(bits)).numpy()
    return array


def from_numpy(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """What to_numpy made, without a copy."""
    tensor = torch.from_numpy(array)
    return tensor if tensor.dtype == dtype else tensor.view(dtype)

"""Serving speculators in inference engines; docs/serving.md says which engine takes what."""

import importlib.util
import os
import sys

from spec.errors import SpecError


class ServingError(SpecError):
    """A speculator that cannot be served: says what was found and what would fit."""


def require_vllm() -> None:
    """Stop where vLLM, an extra, is not installed; the ServingError says how to install it."""
    if importlib.util.find_spec("vllm") is None:
        raise ServingError(
            f"vLLM is not installed in {sys.prefix}: `pip install '.[vllm]'`, or `make venv-vllm` for a "
            "machine without a GPU (docs/serving.md)"
        )


def bound_cpu_memory() -> None:
    """Let vLLM take 4 GiB for keys and values on a CPU, unless VLLM_CPU_KVCACHE_SPACE says how many.

    Left alone it wants 92 % of the machine's memory free, and does not start where it is not. GPUs do not read this.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")

"""Serving speculators in inference engines; docs/serving.md says which engine takes what."""

import importlib.metadata
import importlib.util
import os
import sys

from spec.errors import SpecError

TESTED = "0.32"
"""The vLLM releases that make test-vllm runs with; others get a warning."""


class ServingError(SpecError):
    """A speculator that cannot be served: says what was found and what would fit."""


def require_vllm() -> None:
    """Stop where vLLM, an extra, is not installed; the ServingError says how to install it."""
    if importlib.util.find_spec("vllm") is None:
        raise ServingError(
            f"vLLM is not installed in {sys.prefix}: `pip install '.[vllm]'`, or `make venv-vllm` for a "
            "machine without a GPU (docs/serving.md)"
        )


def installed_vllm() -> str | None:
    """The release that is installed, where a package says so; vLLM itself takes seconds to import."""
    packages = importlib.metadata.packages_distributions().get("vllm", [])  # the CPU build has a name of its own
    return importlib.metadata.version(packages[0]) if packages else None


def untested(version: str) -> str | None:
    """A warning of a vLLM release that speculators were not tested with."""
    tested = version.startswith(f"{TESTED}.")
    return None if tested else f"vLLM {version}: speculators were tested with {TESTED}.* only"


def bound_cpu_memory() -> None:
    """Let vLLM take 4 GiB for keys and values on a CPU, unless VLLM_CPU_KVCACHE_SPACE says how many.

    Left alone it wants 92 % of the machine's memory free, and does not start where it is not. GPUs do not read this.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")

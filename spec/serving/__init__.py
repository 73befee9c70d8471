"""Serving speculators in inference engines; docs/serving.md says which engine takes what."""

from spec.errors import SpecError


class ServingError(SpecError):
    """A speculator that cannot be served: says what was found and what would fit."""

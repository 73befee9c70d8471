"""Speculators in the formats of serving engines, and back.

``arctic`` says what that format can hold and what its config is; ``writing`` makes a folder, ``reading`` turns a public
folder into a speculator, ``card`` describes an export.
"""

from spec.export.format import ExportError, Format
from spec.export.reading import KnownBase, identify_base, read
from spec.export.writing import FORMATS, find, measured_on, read_architectures, write

__all__ = [
    "FORMATS",
    "ExportError",
    "Format",
    "KnownBase",
    "find",
    "identify_base",
    "measured_on",
    "read",
    "read_architectures",
    "write",
]

"""Speculators in the formats of serving engines, and back.

``arctic`` says what that format can hold and what its config is; ``writing`` makes a folder, ``reading`` turns a public
folder into a speculator, ``card`` describes an export.
"""

from spec.export.arctic import ExportError
from spec.export.reading import KnownBase, identify_base, read
from spec.export.writing import measured_on, read_architectures, write

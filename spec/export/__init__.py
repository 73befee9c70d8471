"""Speculators in the formats of serving engines, and back.

``format`` is what the writer asks of a format: what it can hold, its config and its tensors. ``arctic`` and ``eagle3``
are the formats, ``writing`` makes a folder, ``reading`` turns a public folder into a speculator, ``card`` describes an
export.
"""

from spec.export.arctic import ARCTIC
from spec.export.eagle3 import VLLM
from spec.export.format import ExportError
from spec.export.reading import identify_base, read
from spec.export.writing import FORMATS, measured_on, read_architectures, write

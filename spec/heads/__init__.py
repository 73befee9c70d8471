"""Speculators: small networks that draft a base model's next tokens from its hidden state (torch alone).

``build`` makes one from a ``SpeculatorConfig``, ``init_random`` or ``init_from_base`` gives it its first weights,
``save`` and ``load`` keep it, ``fuse`` readies it for drafting.
"""

from spec.heads.build import build
from spec.heads.checkpoint import (
    CONFIG,
    WEIGHTS,
    CheckpointError,
    check_base,
    load,
    read_config,
    read_weights,
    restore,
    save,
)
from spec.heads.config import SpeculatorConfig
from spec.heads.init import init_from_base, init_random
from spec.heads.speculator import LAST, Carry, Packed, Speculator, Tap
from spec.heads.sum_lstm import SumLstm, fuse
from spec.heads.sum_rnn import SumRnn

"""Speculators: small networks that draft a base model's next tokens from its hidden state (torch alone).

``build`` makes one from a ``SpeculatorConfig``, ``init_random`` or ``init_from_base`` gives it its first weights,
``save`` and ``load`` keep it. ``Packed`` holds what it reads, ``Speculator`` says what it does.
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
from spec.heads.packed import LAST, Packed, Supervision, Tap, supervise
from spec.heads.position_wise import PositionWise
from spec.heads.speculator import Session, Speculator
from spec.heads.sum_lstm import SumLstm
from spec.heads.sum_rnn import SumRnn

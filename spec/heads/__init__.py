"""Speculators: small networks that draft a base model's next tokens from its hidden state (torch and pydantic alone).

``method`` finds a kind of head by its name, ``build`` makes one from a config, ``initialise`` gives it its first
weights, ``save`` and ``load`` keep it. ``Packed`` holds what it reads, ``Speculator`` says what it does.
"""

from spec.heads.checkpoint import (
    CONFIG,
    WEIGHTS,
    CheckpointError,
    check_base,
    load,
    no_tables,
    read_config,
    read_weights,
    restore,
    save,
)
from spec.heads.config import Layer, OnBase, Params, SpeculatorConfig
from spec.heads.packed import LAST, Packed, Supervision, Tap, supervise
from spec.heads.recurrent import Recurrent
from spec.heads.registry import build, method, on_base, parse_config
from spec.heads.speculator import Choose, Session, Speculator
from spec.heads.sum_lstm import SumLstm, SumLstmConfig
from spec.heads.sum_rnn import SumRnn, SumRnnConfig

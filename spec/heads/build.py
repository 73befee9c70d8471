"""From a config to its network."""

from __future__ import annotations

from torch import Tensor

from spec.config import Method
from spec.heads.config import SpeculatorConfig
from spec.heads.speculator import Speculator
from spec.heads.sum_lstm import SumLstm
from spec.heads.sum_rnn import SumRnn

METHODS: dict[Method, type[Speculator]] = {"sum_rnn": SumRnn, "sum_lstm": SumLstm}


def build(config: SpeculatorConfig, token_map: Tensor | None = None) -> Speculator:
    """The config's network in float32, its weights not yet those of init_random or init_from_base; see Speculator."""
    return METHODS[config.method](config, token_map)

"""The methods by name: those of this package, and those that other packages bring.

Another package brings a method by an entry point in the group "spec.heads"; its code is loaded when it is named.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor

from spec.errors import SpecError
from spec.heads.config import Layer, OnBase, Params, SpeculatorConfig
from spec.heads.speculator import Speculator

METHODS = {
    "sum_rnn": "spec.heads.sum_rnn:SumRnn",
    "sum_lstm": "spec.heads.sum_lstm:SumLstm",
    "eagle3": "spec.heads.eagle3:Eagle3",
}
GROUP = "spec.heads"
GONE = {
    "medusa": "method medusa is gone: vLLM dropped such heads in 0.33, and they were the weakest; use sum_rnn or "
    "sum_lstm"
}


def method(name: object) -> type[Speculator]:
    """The class of a method; a ValueError says that there is none of this name, or that it cannot be loaded."""
    key = str(name)
    if key in GONE:
        raise ValueError(GONE[key])
    brought = {} if key in METHODS else {point.name: point.value for point in entry_points(group=GROUP)}
    known = brought | METHODS
    if key not in known:
        raise ValueError(f"method {name!r} is not known; there are {', '.join([*METHODS, *sorted(brought)])}")
    try:
        found: type[Speculator] = pkgutil.resolve_name(known[key])
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method {key}: {known[key]} cannot be loaded ({error})") from None
    return found


def unused_keys(name: object) -> dict[str, Any]:
    """The keys of params.yaml that other methods have and this one has not, with their defaults as a file has them."""
    own = method(name).Params.model_fields
    found: dict[str, Any] = {}
    for other in METHODS:
        found |= method(other).Params(method=other).model_dump(mode="json")
    return {key: default for key, default in found.items() if key not in own}


def on_base(params: Params, base: OnBase, layer: Layer | None = None) -> SpeculatorConfig:
    """The network that params ask for, on a base with layers of this shape; a SpecError says why there is none."""
    config = method(params.method).Config
    values = params.model_dump(exclude={"init"}) | base.model_dump()
    if "layer" in config.model_fields:
        if layer is None:
            raise SpecError(
                f"model.speculator: method {params.method} repeats the base's layers, but they differ in shape"
            )
        values["layer"] = layer.model_dump()
    try:
        return config.from_json(values)
    except ValueError as error:
        raise SpecError(f"model.speculator: {error}") from None


def parse_config(values: Mapping[str, Any]) -> SpeculatorConfig:
    """What a config.json holds; keys that only other methods have are ignored. A ValueError says what makes no
    network."""
    others = unused_keys(values.get("method"))
    own = {key: value for key, value in values.items() if key not in others}
    return method(values["method"]).Config.from_json(own)


def build(config: SpeculatorConfig, token_map: Tensor | None = None) -> Speculator:
    """The config's network in float32, before initialise gives it weights; see Speculator."""
    return method(config.method)(config, token_map)

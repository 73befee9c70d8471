"""What every group of parameters shares: how it is checked, and how a wrong value is explained."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

DATE = datetime.date(2026, 1, 1)
"""The default of data.date."""

Dims = tuple[int, ...]


def parse_dims(value: object) -> Dims:
    """Read a width (``512``) or a dot-separated stack of widths (``"1024.2048"``)."""
    if isinstance(value, float):  # as which YAML reads an unquoted 1024.2560
        raise ValueError(
            f"{value!r} is a number with a fraction; a list of widths must be quoted: "
            "'\"1024.2048\"' in YAML and on the command line of dvc"
        )
    entries = value.split(".") if isinstance(value, str) else value if isinstance(value, tuple | list) else [value]
    try:
        dims = tuple(int(str(entry)) for entry in entries)
    except ValueError:
        raise ValueError(f'{value!r} is not an integer or a dot-separated list such as "1024.2048"') from None
    if not dims or min(dims) < 1:
        raise ValueError(f"{value!r} has a width below 1")
    return dims


def format_dims(dims: Dims) -> int | str:
    """Write widths as parse_dims reads them."""
    return dims[0] if len(dims) == 1 else ".".join(map(str, dims))


def listed(value: object) -> object:
    """One string, or a list as YAML has it, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


DimsField = Annotated[Dims, BeforeValidator(parse_dims), PlainSerializer(format_dims)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A group of parameters: frozen, no unknown keys, no silent conversions; null stands for its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler({} if values is None else values)
        except ValidationError as error:
            raise ValidationError.from_exception_data(cls.__name__, list(map(cls._explained, error.errors()))) from None

    @classmethod
    def _explained(cls, error: ErrorDetails) -> InitErrorDetails:
        """The error with a message that says what was found and what would fit."""
        message = error["msg"].removeprefix("Value error, ")
        message = f"{message[0].lower()}{message[1:]}"
        if error["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(error["loc"][-1]), cls.model_fields, n=1)
            fitting = f"did you mean {close[0]}?" if close else f"known here: {', '.join(cls.model_fields)}"
            message = f"unknown key; {fitting}"
        elif error["type"] not in ("value_error", "missing"):
            message += f", found {error['input']!r}"
        custom = PydanticCustomError("value_error", "{message}", {"message": message})
        return InitErrorDetails(type=custom, loc=error["loc"], input=error["input"])


def explain(error: ValidationError) -> Iterator[str]:
    """A line on each wrong key of a section: where, what was found, what would fit."""
    for each in error.errors():
        location = ".".join(map(str, each["loc"]))
        yield ": ".join([*filter(None, [location]), each["msg"].removeprefix("Value error, ")])

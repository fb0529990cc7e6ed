"""What a single value in a profile may be (a size, a duration, a name, devices), and what all its sections have in
common.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from dynamo_box.profile.units import DURATION_PATTERN, SIZE_PATTERN, parse_duration, parse_size

Location = tuple[str | int, ...]


class Impossible(ValueError):
    """Problems of one mapping, each with its location relative to it; `unknown` are those of keys that it
    can't have.
    """

    def __init__(self, *problems: tuple[Location, str], unknown: tuple[tuple[Location, str], ...] = ()) -> None:
        super().__init__("; ".join(text for _, text in (*unknown, *problems)))
        self.problems = problems
        self.unknown = unknown


_SIZE_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": SIZE_PATTERN}]}
_DURATION_SCHEMA = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": DURATION_PATTERN}]}

Size = Annotated[int, BeforeValidator(parse_size), WithJsonSchema(_SIZE_SCHEMA)]
PositiveSize = Annotated[Size, Field(gt=0)]
Duration = Annotated[float, BeforeValidator(parse_duration), WithJsonSchema(_DURATION_SCHEMA)]


def _latency(value: object) -> float:
    """People count these in milliseconds: a number alone would be taken for seconds without a word."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f'needs a unit, {value} has none: write "{value}ms" or "{value}s"')
    return parse_duration(value)


Latency = Annotated[float, BeforeValidator(_latency), WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN})]


def _idle_ttl(value: object) -> object:
    return None if value == "never" else parse_duration(value)


_IDLE_TTL_SCHEMA = {"anyOf": [*_DURATION_SCHEMA["anyOf"], {"const": "never"}]}
IdleTtl = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_idle_ttl), WithJsonSchema(_IDLE_TTL_SCHEMA)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def _devices(value: object) -> object:
    if value == "cpu" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    if isinstance(value, tuple) and value and all(type(index) is int and index >= 0 for index in value):
        if len(set(value)) != len(value):
            raise ValueError("names a device twice")
        return value
    raise ValueError('must be "cpu", a number of GPUs, or a list of GPU indices')


Devices = Annotated[
    Any,
    AfterValidator(_devices),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": "cpu"},
                {"type": "integer", "minimum": 1},
                {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 0},
                    "minItems": 1,
                    "uniqueItems": True,
                },
            ]
        }
    ),
]


def _option(value: object) -> object:
    if isinstance(value, bool | int | float | str):
        return value
    raise ValueError("an engine option must be a text, a number, true or false")


OptionValue = Annotated[
    Any, AfterValidator(_option), WithJsonSchema({"type": ["string", "number", "integer", "boolean"]})
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

"""The base class of all configuration models. It refuses unknown keys and impossible values."""

from __future__ import annotations

from math import isfinite
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

LARGEST_NUMBER = 2**53  # float64, and so JSON, represents every whole number up to this one exactly
LARGEST_FLOAT, SMALLEST_FLOAT = 1e30, 1e-30  # products of such numbers are neither infinite nor 0 in float32

# Bounds of fields that have no natural one: far above every use, and far below what a machine could count up to.
MOST_PROCESSES = 100_000
MOST_CPUS, MOST_GPUS, MOST_GIB = 10_000, 1_000, 1_000_000  # of one process
MOST_STEPS = 100_000_000
MOST_ROWS = 10_000_000_000
MOST_TOKENS = 100_000_000
MOST_SECONDS = 100_000_000  # three years


def field_error(field: str, what: str) -> PydanticCustomError:
    """Build the error that a validator raises: `field` (`a.b` for a nested field) is wrong, and `what` states why."""
    return PydanticCustomError("field_error", "{what}", {"field": field, "what": what})


class StrictModel(BaseModel):
    """A pydantic model that refuses unknown keys and NaN, and whose values cannot be changed.

    The string below a field in the code becomes the description of this field in the schema.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),  # `model` is a section of the recipe, not a pydantic method
    )

    @model_validator(mode="before")
    @classmethod
    def _values_are_possible(cls, values: Any) -> Any:
        """Refuse numbers that are impossibly large, and booleans in fields for numbers or text.

        YAML reads an unquoted yes, no, on or off as a boolean.
        """
        for name, field in cls.model_fields.items() if isinstance(values, dict) else ():
            value, kind = values.get(name), field.annotation
            if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
                text = str(value).lower()
                what = f"{text} is not allowed here (YAML reads yes, no, on and off as booleans: quote text)"
                raise field_error(name, what)
            if type(value) is int and abs(value) > LARGEST_NUMBER:
                raise field_error(name, f"{value:.3g} is too large; at most 2**53 is allowed")
            if (
                type(value) is float
                and isfinite(value)
                and (abs(value) > LARGEST_FLOAT or 0 < abs(value) < SMALLEST_FLOAT)
            ):
                raise field_error(
                    name,
                    f"{value:.3g} is outside of {SMALLEST_FLOAT:g} to {LARGEST_FLOAT:g}, the range in which float32 computes",
                )
        return values

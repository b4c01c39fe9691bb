"""The base class of all configuration models. It refuses unknown keys and impossible values."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

LARGEST_NUMBER = 2**53  # float64, and so JSON, represents every whole number up to this one exactly


def field_error(field: str, what: str) -> PydanticCustomError:
    """Build the error that the validator of a recipe section raises about one field (`a.b` for a nested field)."""
    return PydanticCustomError("field_error", "{what}", {"field": field, "what": what})


class StrictModel(BaseModel):
    """A model that refuses unknown keys, NaN and later changes. The string below a field is the field's description."""

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
        return values

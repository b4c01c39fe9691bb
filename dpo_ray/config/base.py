"""The base of every configuration model: frozen, and strict about unknown keys and about what is a number."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


def field_error(field: str, what: str) -> PydanticCustomError:
    """Make the error that a section's validator raises about one of its fields (`a.b` for one further below)."""
    return PydanticCustomError("field_error", "{what}", {"field": field, "what": what})


class StrictModel(BaseModel):
    """Refuse unknown keys, NaN and later changes; take field descriptions from the strings under the fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),  # `model` is a section of the recipe, not a pydantic method
    )

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, values: Any) -> Any:
        """Refuse yes, no, on and off, which YAML reads as truth values, where a number or text is meant."""
        for name, field in cls.model_fields.items() if isinstance(values, dict) else ():
            value, kind = values.get(name), field.annotation
            if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
                said = str(value).lower()
                raise field_error(name, f"{said} is not allowed here (YAML reads yes, no, on, off so: quote text)")
        return values

"""The fields of a recipe that hold a path or a URI, which all nodes of a cluster must be able to access."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MADE_BY_THE_RUN = ("output", "reference.store")
OPEN_MAPPINGS = ("chat_template_kwargs", "columns", "criteria")  # their keys are chosen by the user


def named_places(values: dict[str, Any], at: str = "") -> Iterator[tuple[dict[str, Any], str, str]]:
    """Find every field with a path or URI in a recipe's values; yield (section, key in the section, dotted field name).

    The section is the mapping itself, so that a caller can replace the value.
    """
    for key, value in values.items():
        field = f"{at}.{key}" if at else key
        if key in OPEN_MAPPINGS or value is None:
            continue
        if isinstance(value, dict):
            yield from named_places(value, field)
        elif isinstance(value, list) and key != "path":
            for number, part in enumerate(value):
                yield from named_places(part, f"{field}[{number}]") if isinstance(part, dict) else ()
        elif field in MADE_BY_THE_RUN or key == "adapter" or (key == "path" and values.get("type") != "hub"):
            yield values, key, field

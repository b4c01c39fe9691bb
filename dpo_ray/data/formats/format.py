"""The definition of a data format: its name in a recipe, its columns, and how a row becomes a preference group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_ray.data.groups import TextGroup

from .fields import Fields

PAIR = {"chosen": ("chosen",), "rejected": ("rejected",)}
TEMPLATE = {"tools": ("tools",), "chat_template_kwargs": ("chat_template_kwargs",)}
IMPLICIT = {"system": ("system",), **PAIR, **TEMPLATE}
EXPLICIT = {"prompt": ("prompt",), **IMPLICIT}
"""Columns that several formats share."""


@dataclass(frozen=True)
class Format:
    """One format of rows.

    Args:
        name: its name in a recipe's `format`.
        columns: the format's own column names, by their names in the recipe's `columns` (`prompt`, `chosen`, ...); the
            first one that is not null is used. A name that ends with NUMBERED represents several columns.
        read: builds a group from a row and the weights of several ratings; raises `Rejected` with the best-fitting
            reason.
        matches: returns whether a row without its null columns has this format, for `format: auto`. It is called before
            the formats that are recognised together (`recognise`); with None, only `recognise` decides.
    """

    name: str
    columns: Mapping[str, tuple[str, ...]]
    read: Callable[[Fields, Mapping[str, float]], TextGroup]
    matches: Callable[[Mapping[str, Any]], bool] | None = None

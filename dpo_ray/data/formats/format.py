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
    """One data format: which columns its rows have, and how a row is read.

    Args:
        name: the format's name in a recipe, as the value of `format`.
        columns: for each role (a key of the recipe's `columns`: `prompt`, `chosen`, ...) the column names that the format
            accepts. The first column whose value is not null is used. A name that ends with NUMBERED ("#") stands for
            several columns.
        read: builds a group from a row; raises `Rejected` with the reason that fits best. The second argument holds the
            recipe's `criteria`: the weights by which several ratings of a completion become one score.
        matches: returns whether a row, passed without its null columns, has this format. `format: auto` calls it before it
            tries the built-in formats. None for a built-in format, as `recognise` has its own rules for them; `auto`
            never finds any other format for which this is None.
    """

    name: str
    columns: Mapping[str, tuple[str, ...]]
    read: Callable[[Fields, Mapping[str, float]], TextGroup]
    matches: Callable[[Mapping[str, Any]], bool] | None = None

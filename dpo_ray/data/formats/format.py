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
        matches: returns whether a row, from which null columns were removed, has this format. With `format: auto`, this
            function is called before the built-in formats are tried. It is None for a built-in format, because
            `recognise` has the rules for those. If it is None for another format, `auto` never finds that format.
    """

    name: str
    columns: Mapping[str, tuple[str, ...]]
    read: Callable[[Fields, Mapping[str, float]], TextGroup]
    matches: Callable[[Mapping[str, Any]], bool] | None = None

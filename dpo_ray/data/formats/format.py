"""What a data format is: its name in a recipe, its columns, and how a row becomes a preference group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_ray.data.groups import TextGroup

from .fields import Fields

PAIR = {"chosen": ("chosen",), "rejected": ("rejected",)}
TEMPLATE = {"tools": ("tools",), "chat_template_kwargs": ("chat_template_kwargs",)}
EXPLICIT = {"prompt": ("prompt",), "system": ("system",), **PAIR, **TEMPLATE}
"""Columns that several formats share."""


@dataclass(frozen=True)
class Format:
    """One format of rows.

    Args:
        name: what a recipe's `format` calls it.
        columns: what the format calls its columns, by their names in the recipe's `columns` (`prompt`, `chosen`, ...); the
            first that is not null counts. A name with NUMBERED at its end stands for several columns.
        read: makes a group of a row, given the weights of several ratings; raises `Rejected` with the reason that fits best.
        matches: returns whether a row without its null columns has this format, for `format: auto`. It is asked before the
            formats that are recognised together (`recognise`); None leaves it to these.
    """

    name: str
    columns: Mapping[str, tuple[str, ...]]
    read: Callable[[Fields, Mapping[str, float]], TextGroup]
    matches: Callable[[Mapping[str, Any]], bool] | None = None

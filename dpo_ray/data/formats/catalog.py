"""The table of all data formats: those that dpo_ray includes, and those that installed packages add."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpo_ray.config.extension import FORMATS as ADDED
from dpo_ray.config.extension import installed
from dpo_ray.config.sources import Columns

from . import compared, llama_factory, pairs, pandalm, scored, swift, unpaired
from .fields import NUMBERED, Fields, named, numbered
from .format import Format
from .media import is_media

_BUILT_IN = {
    each.name: each
    for module in (pairs, unpaired, scored, pandalm, llama_factory, swift, compared)
    for each in module.FORMATS
}
FORMATS: dict[str, Format] = installed(ADDED, {*_BUILT_IN, "auto"}) | _BUILT_IN


def fields_of(row: Mapping[str, Any], row_format: str, columns: Columns) -> Fields:
    """Combine a row with the column names that are accepted for each role (`prompt`, `chosen`, ...).

    These are the names that the recipe sets for the role, or else the names of the format.
    """
    names = _names(columns)[row_format]  # pyright: ignore[reportArgumentType] - pydantic hashes frozen models
    return Fields(row, names, columns)


@functools.lru_cache(maxsize=64)
def _names(columns: Columns) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
    return {
        name: {role: named(role, columns) or own for role, own in each.columns.items()}
        for name, each in FORMATS.items()
    }


@functools.lru_cache(maxsize=64)
def message_columns(columns: Columns) -> frozenset[str]:
    """Return the names of all columns that may hold messages: the names in the formats, or those that the recipe sets."""
    roles = ("prompt", "chosen", "rejected", "completion", "completions", "sides")
    names = _names(columns)  # pyright: ignore[reportArgumentType] - as above
    return frozenset(name for each in names.values() for role in roles for name in each.get(role, ()))


@functools.lru_cache(maxsize=64)
def named_columns(columns: Columns) -> frozenset[str]:
    """Return all column names that the recipe sets, for any role."""
    return frozenset(name for role in type(columns).model_fields for name in named(role, columns))


def wanted(names: Sequence[str], columns: Columns) -> list[str]:
    """Return those columns of a table that at least one format reads.

    If no format finds the columns that it needs, return all columns of the table, so that the error can list them.
    """
    accepted: dict[str, set[str]] = {}
    for each in FORMATS.values():
        for role, patterns in each.columns.items():
            accepted.setdefault(role, set()).update(named(role, columns) or patterns)
    present = {role: _matching(names, patterns) for role, patterns in accepted.items()}
    complete = (
        (present["chosen"] and present["rejected"])
        or (present["label"] and (present["completion"] or present["prompt"]))
        or (present["completions"] and (present["annotators"] or present["prompt"]))
        or (present["rejected"] and (present["query"] or "messages" in names))
        or (present["preference"] and present["sides"])
    )
    if not complete:
        return list(names)
    needed = set().union(*present.values(), filter(is_media, names))  # so that a row with media is rejected
    return [name for name in names if name in needed]


def _matching(names: Sequence[str], patterns: Iterable[str]) -> set[str]:
    plain = set(patterns)
    stems = [p for p in plain if p.endswith(NUMBERED)]
    return {n for n in names if n in plain}.union(*(numbered(names, stem) for stem in stems))

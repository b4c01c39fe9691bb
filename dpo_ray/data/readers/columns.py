"""Selects the columns of a shard (input file) that are needed to read its rows."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_ray.config.sources import Columns
from dpo_ray.data.admission import Rejected
from dpo_ray.data.formats.catalog import wanted


def columns_to_read(names: Sequence[str], columns: Columns) -> list[str]:
    """Return those columns of a shard that at least one format reads.

    Raises:
        Rejected: SHARD_DUPLICATE_COLUMN, if one of these columns occurs more than once.
    """
    chosen = list(wanted(list(dict.fromkeys(names)), columns))
    for name in chosen:
        if names.count(name) > 1:
            raise Rejected("SHARD_DUPLICATE_COLUMN", f"there are {names.count(name)} columns `{name}`")
    return chosen

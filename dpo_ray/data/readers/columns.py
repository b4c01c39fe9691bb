"""The choice of the columns of a shard that its rows are made of."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_ray.config.sources import Columns
from dpo_ray.data.admission import Rejected
from dpo_ray.data.formats.catalog import wanted


def columns_to_read(names: Sequence[str], columns: Columns) -> list[str]:
    """Return those of a shard's columns that any format needs.

    Raises:
        Rejected: SHARD_DUPLICATE_COLUMN if one of them occurs twice.
    """
    chosen = list(wanted(list(dict.fromkeys(names)), columns))
    for name in chosen:
        if names.count(name) > 1:
            raise Rejected("SHARD_DUPLICATE_COLUMN", f"there are {names.count(name)} columns `{name}`")
    return chosen

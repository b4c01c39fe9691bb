"""The columns of a row: what each format calls them, what a recipe calls them instead, and what they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_ray.config.sources import Columns
from dpo_ray.data.admission import DETAIL_CHARACTERS, Rejected

NUMBERED = "#"
"""Ends a name that stands for several columns: `response#` for response1, response2, ... or response_1, ..."""


class Fields(NamedTuple):
    """One row, by the recipe's names of columns."""

    row: Mapping[str, Any]
    names: Mapping[str, tuple[str, ...]]
    columns: Columns

    def column(self, role: str) -> str:
        """Name the column of a role: the first accepted one that is not null, else the first that is there, else the first."""
        names = self.names.get(role, ())
        for name in names:
            if self.row.get(name) is not None:
                return name
        for name in names:
            if name in self.row:
                return name
        return names[0] if names else role

    def get(self, role: str) -> Any:
        """Return the value of a role, None where there is none."""
        return self.row.get(self.column(role))

    def need(self, role: str, missing: str) -> Any:
        """Return the value of a role.

        Raises:
            Rejected: with the reason `missing` where there is no such column; NULL_FIELD where it is null.
        """
        return self._value(self.column(role), missing)

    def spread(self, role: str) -> Sequence[str]:
        """List the columns of a role that has one for each completion or annotator; [] for any other role."""
        given = getattr(self.columns, role)
        if isinstance(given, tuple):
            return given
        patterns = (name for name in self.names.get(role, ()) if name.endswith(NUMBERED))
        return [column for pattern in patterns for column in numbered(self.row, pattern)]

    def several(self, role: str, missing: str) -> list[Any] | None:
        """Return the values of a role that has a column for each completion or annotator; None where it has not.

        Raises:
            Rejected: with the reason `missing` where the recipe names a column that is not there.
        """
        columns = self.spread(role)
        absent = next((name for name in columns if name not in self.row), None)
        if absent is not None:
            raise Rejected(missing, self._absent(absent))
        return [self.row[name] for name in columns] or None

    def _value(self, column: str, missing: str) -> Any:
        if column not in self.row:
            raise Rejected(missing, self._absent(column))
        if self.row[column] is None:
            raise Rejected("NULL_FIELD", f"`{column}` is null")
        return self.row[column]

    def _absent(self, column: str) -> str:
        return f"no column `{column}`; the row has: {', '.join(map(str, self.row))}"[:DETAIL_CHARACTERS]


def named(role: str, columns: Columns) -> tuple[str, ...]:
    """List the recipe's own names for a role; none where it leaves them to the format."""
    given = getattr(columns, role, None)  # some columns have no name in a recipe
    return (given,) if isinstance(given, str) else given or ()


def numbered(names: Iterable[str], pattern: str) -> list[str]:
    """List the names that a pattern such as `response#` stands for, by their numbers."""
    form = re.compile(re.escape(pattern.removesuffix(NUMBERED)) + r"_?(\d+)")
    found = [(int(match[1]), name) for name in names if (match := form.fullmatch(name))]
    return [name for _, name in sorted(found)]

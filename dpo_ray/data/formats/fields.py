"""Finds the columns of a row by their role (`prompt`, `chosen`, ...): a format or the recipe sets the names for each role."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_ray.config.sources import Columns
from dpo_ray.data.admission import DETAIL_CHARACTERS, Rejected

NUMBERED = "#"
"""The last character of a name that stands for several columns: `response#` stands for response1, response2, ...
or for response_1, response_2, ..."""


class Fields(NamedTuple):
    """One row of data, and the names that its columns may have.

    The role of a column is what it holds: `prompt`, `chosen`, `score`, ... `names` lists the accepted column names for each
    role.
    """

    row: Mapping[str, Any]
    names: Mapping[str, tuple[str, ...]]
    columns: Columns

    def column(self, role: str) -> str:
        """Return the name of the column that holds a role (`prompt`, `chosen`, ...).

        The result is the first accepted name of the role whose value in the row is not null. If there is none, it is the
        first accepted name that the row has at all. If the row has none of them, it is the first accepted name.
        """
        names = self.names.get(role, ())
        for name in names:
            if self.row.get(name) is not None:
                return name
        for name in names:
            if name in self.row:
                return name
        return names[0] if names else role

    def get(self, role: str) -> Any:
        """Return the value of the column that holds a role, such as `chosen`; None if the row does not have this column."""
        return self.row.get(self.column(role))

    def need(self, role: str, missing: str) -> Any:
        """Return the value of a role's column.

        Raises:
            Rejected: with the reason `missing` if the row does not have the column; with NULL_FIELD if the value is null.
        """
        return self._value(self.column(role), missing)

    def spread(self, role: str) -> Sequence[str]:
        """List the columns of a role, if it has one column per completion or per annotator (response1, response2, ...).

        If the role has a single column, the list is empty.
        """
        given = getattr(self.columns, role)
        if isinstance(given, tuple):
            return given
        patterns = (name for name in self.names.get(role, ()) if name.endswith(NUMBERED))
        return [column for pattern in patterns for column in numbered(self.row, pattern)]

    def several(self, role: str, missing: str) -> list[Any] | None:
        """Return the values of a role, if it has one column per completion or per annotator (response1, response2, ...).

        Return None if the role has a single column, or if the row has no column of this role.

        Raises:
            Rejected: with the reason `missing` if the recipe names a column that the row does not have.
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
    """Return the column names that the recipe sets for a role; () if it sets none, so that the format's names apply."""
    given = getattr(columns, role, None)  # some columns have no name in a recipe
    return (given,) if isinstance(given, str) else given or ()


def numbered(names: Iterable[str], pattern: str) -> list[str]:
    """List the names that match a pattern such as `response#` (response1, response2, ...), sorted by their numbers."""
    form = re.compile(re.escape(pattern.removesuffix(NUMBERED)) + r"_?(\d+)")
    found = [(int(match[1]), name) for name in names if (match := form.fullmatch(name))]
    return [name for _, name in sorted(found)]

"""Where workers leave what the driver is to hear. Light to import: the actor's own process loads it."""

from __future__ import annotations

from typing import Any


class Inbox:
    """An actor that holds rows from rank 0 until the driver takes them."""

    def __init__(self) -> None:
        self._rows: list[Any] = []

    def put(self, row: Any) -> None:
        self._rows.append(row)

    def take(self) -> list[Any]:
        rows, self._rows = self._rows, []
        return rows

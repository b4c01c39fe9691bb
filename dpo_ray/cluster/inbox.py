"""What the driver and its workers tell each other. Light to import: the actor's own process loads it."""

from __future__ import annotations

import asyncio
from typing import Any


class Inbox:
    """An actor that holds rows from rank 0 until the driver takes them, and the driver's word to stop."""

    def __init__(self) -> None:
        self._rows: list[Any] = []
        self._stop = asyncio.Event()

    async def put(self, row: Any) -> None:
        self._rows.append(row)

    async def take(self) -> list[Any]:
        rows, self._rows = self._rows, []
        return rows

    async def stop(self) -> None:
        """Tell all who wait for it, now and later, that the driver was asked to stop."""
        self._stop.set()

    async def pause(self) -> None:
        """Tell those who wait for it now, and not those to come, to stop: they are to begin again."""
        self._stop.set()
        self._stop.clear()

    async def stopped(self) -> None:
        """Return when the driver was asked to stop: a worker sees that without a message, by a reference to this call."""
        await self._stop.wait()

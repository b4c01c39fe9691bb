"""The messages between the driver and its workers. Light to import, because the actor's own process loads it."""

from __future__ import annotations

import asyncio
from typing import Any


class Inbox:
    """An actor that holds rows from rank 0 until the driver takes them, and the driver's request to stop."""

    def __init__(self) -> None:
        self._rows: list[Any] = []
        self._stop = asyncio.Event()

    async def put(self, row: Any) -> None:
        self._rows.append(row)

    async def take(self) -> list[Any]:
        rows, self._rows = self._rows, []
        return rows

    async def stop(self) -> None:
        """Notify everyone who waits, now or later, that the driver was asked to stop."""
        self._stop.set()

    async def pause(self) -> None:
        """Notify those who wait now, but not those who wait later, to stop: the workers are to start again."""
        self._stop.set()
        self._stop.clear()

    async def stopped(self) -> None:
        """Wait until the driver was asked to stop. A worker holds a reference to this call, so it needs no message."""
        await self._stop.wait()

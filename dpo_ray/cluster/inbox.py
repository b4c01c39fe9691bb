"""The messages between the driver and its workers. The actor's process loads this module, so it imports very little."""

from __future__ import annotations

import asyncio
from typing import Any


class Inbox:
    """An actor between the training workers and the driver.

    It keeps rows of metrics from rank 0 until the driver takes them, and passes on the driver's request to stop.
    """

    def __init__(self) -> None:
        self._rows: list[Any] = []
        self._stop = asyncio.Event()

    async def put(self, row: Any) -> None:
        self._rows.append(row)

    async def take(self) -> list[Any]:
        rows, self._rows = self._rows, []
        return rows

    async def stop(self) -> None:
        """Request all workers to stop: every call of `stopped` returns, also a call that is made later."""
        self._stop.set()

    async def pause(self) -> None:
        """Request the workers that run now to stop, so that new workers can start.

        Only the calls of `stopped` that wait now return. Later calls, from the new workers, wait again.
        """
        self._stop.set()
        self._stop.clear()

    async def stopped(self) -> None:
        """Wait for a request to stop. A worker keeps the reference to this call to see when the call has returned."""
        await self._stop.wait()

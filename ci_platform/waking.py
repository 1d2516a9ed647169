"""A task that sleeps until it is woken or until a time, on the platform's clock."""

from __future__ import annotations

import asyncio
from datetime import datetime

from dynflow.clock import Clock, to_microseconds


class Waker:
    """For one sleeper and any wakers, all on one event loop. A wake while nobody sleeps is not lost."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._event = asyncio.Event()

    def wake(self) -> None:
        """End the sleep, or the next one."""
        self._event.set()

    async def wait(self, until: datetime | None = None) -> None:
        """Sleep until woken, or until the clock says `until`."""
        timer = None if until is None else self._clock.call_at(to_microseconds(until), self._event.set)
        try:
            await self._event.wait()
            self._event.clear()
        finally:
            if timer is not None:
                timer.cancel()

"""Which runs something happened to: the one way by which engine, gates and API make `Runs` look again."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from ci_platform.waking import Waker
from dynflow.clock import Clock


class Notices:
    """A set of run ids, and a sleeper that wakes when it grows. On one event loop."""

    def __init__(self, clock: Clock) -> None:
        self._waker = Waker(clock)
        self._run_ids: set[str] = set()

    def add(self, run_id: str) -> None:
        """Have the run looked at soon."""
        self._run_ids.add(run_id)
        self._waker.wake()

    def take(self, *, but: Collection[str] = ()) -> set[str]:
        """Return the noted runs and forget them, leaving those in `but` for later."""
        taken = self._run_ids.difference(but)
        self._run_ids -= taken
        return taken

    def wake(self) -> None:
        """End the wait without a new notice."""
        self._waker.wake()

    async def wait(self, until: datetime | None = None) -> None:
        """Sleep until there is something new, or until the clock says `until`."""
        await self._waker.wait(until)

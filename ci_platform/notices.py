"""Which runs something happened to: the one way by which engine, gates and API make `Runs` look again."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from ci_platform.waking import Waker
from dynflow.clock import Clock, to_microseconds

# What is not urgent is looked at this much later, together with what comes until then: looking costs a few
# transactions, which a run that is just starting should not have to share its time with.
_LINGER = timedelta(milliseconds=150)


class Notices:
    """A set of run ids, and a sleeper that wakes when it grows. On one event loop."""

    def __init__(self, clock: Clock) -> None:
        self._waker = Waker(clock)
        self._clock = clock
        self._run_ids: set[str] = set()
        self._lingering: set[str] = set()

    def add(self, run_id: str, *, urgent: bool = True) -> None:
        """Have the run looked at now, or shortly if it is not urgent."""
        if urgent:
            self._run_ids.add(run_id)
            self._waker.wake()
        elif run_id not in self._lingering:
            self._lingering.add(run_id)
            self._clock.call_at(to_microseconds(self._clock.now() + _LINGER), lambda: self._lingered(run_id))

    def _lingered(self, run_id: str) -> None:
        self._lingering.discard(run_id)
        self.add(run_id)

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

"""Looks after the room on the disk: collects at once where there is little, and lets held runs begin again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from ci_platform.garbage.collector import Collector
from ci_platform.garbage.room import Room
from ci_platform.waking import Waker
from dynflow.clock import Clock

_log = logging.getLogger(__name__)

_EVERY = timedelta(seconds=2)
"""Between two looks: what they cost does not show, and who waits for room waits no longer than this."""

_AGAIN = timedelta(minutes=1)
"""After a collection that found nothing: what there is has to be looked through each time."""

_REST = 20
"""Times as long as a collection took, while there is still too little: it costs no more than 5 % of the time."""

_LONGEST = timedelta(minutes=10)
"""What has become garbage meanwhile does not wait for longer."""


class RoomKeeper:
    """A service. `let_go` has runs begin that were held back for want of room. `wake` it where room was missed."""

    def __init__(self, collector: Collector, room: Room, clock: Clock, let_go: Callable[[], object]) -> None:
        self.room = room
        self._collector, self._clock, self._let_go = collector, clock, let_go
        self._waker = Waker(clock)
        self._not_before: datetime | None = None

    def wake(self) -> None:
        """Look now."""
        self._waker.wake()

    async def serve(self) -> None:
        """Look every two seconds, for ever."""
        while True:
            try:
                await self.look()
            except Exception:  # noqa: BLE001 - what could not be collected is tried again; it must not stop the server
                _log.exception("garbage could not be collected")
            await self._waker.wait(self._clock.now() + _EVERY)

    async def look(self) -> None:
        """Make room where there is little, then let go whoever waits for it, if there is."""
        now = self._clock.now()
        if self.room.is_little() and (self._not_before is None or now >= self._not_before):
            report = await self._collector.collect(self.room.wanted)
            freed = sum(item.size for item in report.items)
            _log.warning(
                "the disk is short of room; collected %d items of %d bytes", len(report.items), freed
            )
            self._not_before = self._clock.now() + self._rest(now, found_nothing=not report.items)
        self._let_go()

    def _rest(self, began: datetime, *, found_nothing: bool) -> timedelta:
        """Return for how long nothing is collected after a collection."""
        if not self.room.is_little():
            return timedelta()
        rest = min(_LONGEST, _REST * (self._clock.now() - began))
        return max(rest, _AGAIN) if found_nothing else rest

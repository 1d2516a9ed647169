"""The only readers of time: the system's clock, and one that tests move by hand.

Inside the engine a time is an integer of microseconds since the epoch, as it is stored.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol

MICROSECOND = timedelta(microseconds=1)
_EPOCH = datetime.fromtimestamp(0, UTC)

# A timer sleeps no longer than this before it looks at the clock again: a system clock that was set,
# or a machine that slept, moves deadlines by at most this much.
_LONGEST_SLEEP = 60.0


def to_datetime(microseconds: int) -> datetime:
    """Return the aware UTC datetime of a stored time."""
    return _EPOCH + microseconds * MICROSECOND


def to_microseconds(moment: datetime) -> int:
    """Return an aware datetime as it is stored."""
    return (moment - _EPOCH) // MICROSECOND


class TimerHandle(Protocol):
    """A timer that can be cancelled."""

    def cancel(self) -> None:
        """Do not call back; no effect after the callback."""


class Clock(ABC):
    """Tells the time and calls back at a time."""

    @abstractmethod
    def now_us(self) -> int:
        """Return microseconds since the epoch."""

    @abstractmethod
    def call_at(self, when_us: int, callback: Callable[[], None]) -> TimerHandle:
        """Call `callback` on the running loop once `now_us() >= when_us`."""

    def call_later(self, delay_us: int, callback: Callable[[], None]) -> TimerHandle:
        """Call `callback` on the running loop after `delay_us`, whatever the time is set to meanwhile."""
        return self.call_at(self.now_us() + delay_us, callback)

    def now(self) -> datetime:
        """Return the aware UTC time."""
        return to_datetime(self.now_us())


class SystemClock(Clock):
    """The machine's wall clock."""

    def now_us(self) -> int:
        """Return microseconds since the epoch."""
        return time.time_ns() // 1000

    def call_at(self, when_us: int, callback: Callable[[], None]) -> TimerHandle:
        """Call back through the running loop's timers."""
        return _SystemTimer(self, when_us, callback)

    def call_later(self, delay_us: int, callback: Callable[[], None]) -> TimerHandle:
        """Call back by the loop's own clock, which nobody sets."""
        return asyncio.get_running_loop().call_later(delay_us / 1e6, callback)


class _SystemTimer:
    def __init__(self, clock: SystemClock, when_us: int, callback: Callable[[], None]) -> None:
        self._clock, self._when_us, self._callback = clock, when_us, callback
        self._loop = asyncio.get_running_loop()
        self._arm()

    def _arm(self) -> None:
        left = (self._when_us - self._clock.now_us()) / 1e6
        self._handle = self._loop.call_later(min(max(left, 0.0), _LONGEST_SLEEP), self._due)

    def _due(self) -> None:
        if self._clock.now_us() >= self._when_us:
            self._callback()
        else:
            self._arm()

    def cancel(self) -> None:
        self._handle.cancel()


class ManualClock(Clock):
    """A clock that stands still until `advance` or `set` moves it; due callbacks run in the order of their times."""

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._now_us = to_microseconds(start)
        self._timers: list[tuple[int, int, _ManualTimer]] = []
        self._order = itertools.count()

    def now_us(self) -> int:
        """Return microseconds since the epoch."""
        return self._now_us

    def call_at(self, when_us: int, callback: Callable[[], None]) -> TimerHandle:
        """Call back when the clock is moved to or past `when_us`; at once (soon) if it is there already."""
        timer = _ManualTimer(callback)
        if when_us <= self._now_us:
            asyncio.get_running_loop().call_soon(timer.fire)
        else:
            heapq.heappush(self._timers, (when_us, next(self._order), timer))
        return timer

    def advance(self, by: timedelta | float) -> None:
        """Move forward by a timedelta or seconds."""
        step = by if isinstance(by, timedelta) else timedelta(seconds=by)
        self._move_to(self._now_us + step // MICROSECOND)

    def advance_to_next(self) -> bool:
        """Move to the next timer that is set; False where there is none."""
        while self._timers and self._timers[0][2].cancelled:
            heapq.heappop(self._timers)
        if not self._timers:
            return False
        self._move_to(max(self._timers[0][0], self._now_us))
        return True

    def _move_to(self, target_us: int) -> None:
        while self._timers and self._timers[0][0] <= target_us:
            when_us, _, timer = heapq.heappop(self._timers)
            self._now_us = max(self._now_us, when_us)
            timer.fire()
        self._now_us = target_us


class _ManualTimer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    @property
    def cancelled(self) -> bool:
        return self._callback is None

    def fire(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()

    def cancel(self) -> None:
        self._callback = None  # what the callback holds goes at once, not when its time comes

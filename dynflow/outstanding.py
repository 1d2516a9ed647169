"""The durable waits that are outstanding while a segment lives. Knows no engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from dynflow.clock import Clock, TimerHandle
from dynflow.engines import Blocked, StepKey, StepRecord
from dynflow.liveness import Liveness
from dynflow.step_host import is_inner


@dataclass(slots=True, eq=False)
class _Wait:
    record: StepRecord
    over: asyncio.Future[None]
    inner: bool
    timer: TimerHandle | None = field(default=None)


class OutstandingWaits:
    """Waits for deadlines and events. While they are `held` none ends by itself, except within a running attempt."""

    def __init__(self, live: Liveness, clock: Clock) -> None:
        self._live, self._clock = live, clock
        self._waits: dict[int, _Wait] = {}
        self.held = False

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._waits)

    async def wait(self, record: StepRecord) -> None:
        """Wait for the record's deadline or its event."""
        inner, deadline = is_inner(), record.deadline
        if (inner or not self.held) and deadline is not None and deadline <= self._clock.now_us():
            return
        wait = _Wait(record, asyncio.get_running_loop().create_future(), inner)
        self._waits[record.seq] = wait
        if deadline is not None:
            wait.timer = self._clock.call_at(deadline, lambda: self._due(wait))
        try:
            await self._live.inactive(wait.over)
        finally:
            del self._waits[record.seq]
            if wait.timer is not None:
                wait.timer.cancel()

    def _due(self, wait: _Wait) -> None:
        if wait.inner or not self.held:
            self._live.resolve(wait.over)

    def end(self, record: StepRecord) -> None:
        """Let whoever waits for this go on: the engine has ended it."""
        if record.seq in self._waits:
            self._live.resolve(self._waits[record.seq].over)

    def release(self) -> None:
        """Hold them no more; those that became due meanwhile end."""
        self.held = False
        for wait in self._waits.values():
            if wait.record.deadline is not None and wait.record.deadline <= self._clock.now_us():
                self._live.resolve(wait.over)

    def dropped(self, records: Iterable[StepRecord]) -> list[StepKey]:
        """Return waits that an earlier segment stored and that nothing of this one is at, now that all is still.

        A replay can cancel a call before it is made, where the first time it had been made and stored.
        """
        return [
            record.key for record in records if record.state == "waiting" and record.seq not in self._waits
        ]

    def blocked(self) -> Blocked:
        """Return that these are all that is left."""
        deadlines = [
            wait.record.deadline for wait in self._waits.values() if wait.record.deadline is not None
        ]
        return Blocked(tuple(sorted(self._waits)), min(deadlines, default=None))

"""Watches what one isolate uses: time without coming back, wall time, CPU, output, calls of bindings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from dynflow.errors import IsolateLimitError
from dynflow.isolates.limits import IsolateLimits

# Looking more often than that would cost more than what it saves.
_SHORTEST_LOOK = 0.005
# Seconds of CPU from one look at a waiting isolate to the next: collecting garbage takes less.
_UNASKED = 0.05


class Watchdog:
    """The account of one isolate. `fail` is called once it is over a limit, or the method that notes it raises.

    *Order of calls*: `load` once; `begin` and `end` around each call; the rest in between. *Concurrency*: one
    event loop, one timer that is only moved where it comes too late: a busy wire costs no timers.
    """

    def __init__(
        self, cpu_clock: Callable[[], int | None], fail: Callable[[IsolateLimitError], None]
    ) -> None:
        self._cpu_clock, self._fail = cpu_clock, fail
        self._loop = asyncio.get_running_loop()
        self._limits = self._of_call = IsolateLimits()
        self._timer: asyncio.TimerHandle | None = None
        self._busy_until: float | None = None
        self._wall_until: float | None = None
        self._look_at_cpu: float | None = None
        self._cpu_before = self._cpu_now = 0.0
        self._waits = True
        self._printed = self._asked = 0
        self._second = (0.0, 0)

    @property
    def waits(self) -> bool:
        """Whether the isolate has said that it waits."""
        return self._waits

    @property
    def busy(self) -> float:
        """Seconds that code may compute without coming back."""
        return self._of_call.busy.total_seconds()

    def has_cpu_left(self) -> bool:
        """Return whether there is enough CPU left for another call to begin; looks at the isolate's clock."""
        self._measure()
        return self._cpu_now * 2000 <= self._limits.isolate_cpu_ms

    def load(self, limits: IsolateLimits) -> None:
        """Watch over `limits` from now on."""
        self._limits = self._of_call = limits

    def begin(self, limits: IsolateLimits) -> None:
        """Begin the account of a call, with its own limits."""
        self._of_call = limits
        self._printed = self._asked = 0
        self._cpu_before = self._cpu_now
        now = self._loop.time()
        self._wall_until = None if limits.wall is None else now + limits.wall.total_seconds()
        # One thread cannot use more CPU than time passes: until then there is no need to look.
        self._look_at_cpu = now + max(_SHORTEST_LOOK, self._cpu_left())
        self._arm()

    def end(self) -> None:
        """End the account of a call."""
        self._measure()
        self._wall_until = self._look_at_cpu = None

    def works_unasked(self) -> bool:
        """Return whether it has computed since its call ended, which nobody accounts for."""
        before = self._cpu_now
        self._measure()
        return self._cpu_now - before > _UNASKED

    def close(self) -> None:
        """Watch no more."""
        self._wall_until = self._look_at_cpu = self._busy_until = None
        if self._timer is not None:
            self._timer.cancel()

    # --- what happens ---

    def sent(self) -> None:
        """Note that the isolate was sent something: if it waited it will run."""
        if self._waits:
            self._waits = False
            self.heard()

    def heard(self) -> None:
        """Note that it came back to its event loop."""
        self._busy_until = self._loop.time() + self.busy
        self._arm()

    def waiting(self, due: float | None) -> None:
        """Note that it waits: `due` seconds for its own timer, or None for whatever comes."""
        self._waits = True
        # Where a timer runs it wakes up by itself, and says so when it waits again.
        self._busy_until = None if due is None else self._loop.time() + max(0.0, due) + self.busy
        self._arm()

    def printed(self, size: int) -> None:
        """Note `size` bytes of output. Raises IsolateLimitError."""
        limits = self._of_call
        self._printed += size
        if self._printed > limits.output:
            raise IsolateLimitError(
                "output",
                limits.output,
                f"the isolate was stopped: it printed more than {limits.output:,} bytes",
            )
        now = self._loop.time()
        since, before = self._second
        self._second = (now, size) if now - since >= 1 else (since, before + size)
        if self._second[1] > limits.output_rate:
            raise IsolateLimitError(
                "output_rate",
                limits.output_rate,
                f"the isolate was stopped: it printed more than {limits.output_rate:,} bytes in a second",
            )

    def asked(self) -> None:
        """Note a call of a binding. Raises IsolateLimitError."""
        self._asked += 1
        most = self._of_call.subrequests
        if most is not None and self._asked > most:
            text = f"the isolate was stopped: it made more than {most:,} calls of bindings"
            error = IsolateLimitError("subrequests", most, text)
            self._fail(error)  # what is raised here is only an answer, which code could catch
            raise error

    # --- time ---

    def _arm(self) -> None:
        # A timer that is due earlier is left alone: it looks again.
        due = min((at for at in (self._busy_until, self._wall_until, self._look_at_cpu) if at), default=None)
        if due is None or (self._timer is not None and self._timer.when() <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._look)

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        over = self._over_time(now) or self._over_cpu(now)
        if over is not None:
            self._fail(over)
        else:
            self._arm()

    def _over_time(self, now: float) -> IsolateLimitError | None:
        limits = self._of_call
        if self._busy_until is not None and now >= self._busy_until:
            text = f"its code ran for {self.busy:g} seconds without coming back to its event loop"
            return IsolateLimitError("busy", limits.busy, f"the isolate was stopped: {text}")
        if self._wall_until is not None and now >= self._wall_until:
            took = limits.wall.total_seconds() if limits.wall is not None else 0
            return IsolateLimitError(
                "wall", limits.wall, f"the isolate was stopped: its call took more than {took:g} seconds"
            )
        return None

    def _over_cpu(self, now: float) -> IsolateLimitError | None:
        if self._look_at_cpu is None or now < self._look_at_cpu:
            return None
        self._measure()
        left = self._cpu_left()
        if left > 0:
            self._look_at_cpu = now + max(_SHORTEST_LOOK, left)
            return None
        name = "isolate_cpu_ms" if self._cpu_now * 1000 >= self._limits.isolate_cpu_ms else "cpu_ms"
        most = getattr(self._of_call, name)
        return IsolateLimitError(
            name, most, f"the isolate was stopped: its code used more than {most:,} ms of CPU"
        )

    def _measure(self) -> None:
        clock = self._cpu_clock()
        if clock is not None:
            try:
                self._cpu_now = time.clock_gettime(clock)
            except OSError:  # it has ended
                return

    def _cpu_left(self) -> float:
        of_call = self._of_call.cpu_ms / 1000 - (self._cpu_now - self._cpu_before)
        return min(of_call, self._limits.isolate_cpu_ms / 1000 - self._cpu_now)

"""Which isolates a loader keeps: those at work, and some that have finished, for the next call of the same code."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path

from dynflow.errors import IsolateLimitError
from dynflow.isolates.process import Isolate
from dynflow.serialization import MEBIBYTE

# Seconds that an isolate waits for another call: a burst of calls shares one.
_IDLE = 10.0
# Seconds after which a new one takes its place: what a tenant's code leaves behind in it does not pile up.
_OLD = 300.0
# Resident bytes of one that is not worth its memory while it does nothing. Fresh ones have 20 MiB, mostly shared.
_GROWN = 64 * MEBIBYTE
_LOOK_EVERY = 1.0
# The machine is short of memory where less than this part is available.
_SHORT = 0.05


class IsolateKeeper:
    """The isolates of one loader. Only what has finished cleanly is kept: see `Isolate.is_usable`.

    *Order of calls*: `started`, then `put` and `take` in turns, `gone` at the end. *Concurrency*: one event loop.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.live: set[Isolate] = set()
        self._warm: OrderedDict[Isolate, Hashable] = OrderedDict()
        self._by_key: dict[Hashable, list[Isolate]] = {}
        self._since: dict[Isolate, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def started(self, isolate: Isolate) -> None:
        """Note a new isolate."""
        self.live.add(isolate)
        self._look_later()

    def gone(self, isolate: Isolate) -> None:
        """Note that an isolate has ended, or is about to."""
        self._forget(isolate)
        self.live.discard(isolate)

    def take(self, key: Hashable) -> Isolate | None:
        """Return the isolate with this code that was used last; it is not kept any more."""
        while found := self._by_key.get(key):
            isolate = found[-1]
            self._forget(isolate)
            if isolate.is_usable and isolate.is_alive and isolate.watchdog.has_cpu_left():
                return isolate
            self.end(isolate)
        return None

    def put(self, key: Hashable, isolate: Isolate) -> None:
        """Keep an isolate for a while, unless it is too old for another call."""
        now = asyncio.get_running_loop().time()
        if now - isolate.started_at > _OLD:
            self.end(isolate)
            return
        self._warm[isolate] = key
        self._by_key.setdefault(key, []).append(isolate)
        self._since[isolate] = now
        while len(self._warm) > self._most:
            # Not before the answer to the call that has ended is on its way.
            isolate = next(iter(self._warm))
            self.gone(isolate)
            asyncio.get_running_loop().call_soon(isolate.kill)
        self._look_later()

    def end(self, isolate: Isolate) -> None:
        """Stop an isolate."""
        self.gone(isolate)
        isolate.kill()

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _forget(self, isolate: Isolate) -> None:
        if isolate not in self._warm:
            return
        key = self._warm.pop(isolate)
        del self._since[isolate]
        same = self._by_key[key]
        same.remove(isolate)
        if not same:
            del self._by_key[key]

    # --- once a second, while there are any ---

    def _look_later(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_EVERY, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self.live:
            return
        now = asyncio.get_running_loop().time()
        is_short = available_memory() < _SHORT
        if is_short and not self._warm:
            self._stop_the_largest()
        for isolate in list(self._warm):
            is_idle = now - self._since[isolate] > _IDLE
            is_at_work = isolate.watchdog.works_unasked() or not isolate.is_usable
            if is_short or is_idle or is_at_work or isolate.resident() > _GROWN:
                self.end(isolate)
        self._look_later()

    def _stop_the_largest(self) -> None:
        largest = max(self.live, key=lambda isolate: isolate.resident(), default=None)
        if largest is not None:
            text = "the isolate was stopped: the machine is short of memory, and this one held the most"
            largest.fail(IsolateLimitError("memory", largest.resident(), text))


def available_memory() -> float:
    """Return which part of the machine's memory can be had."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return found["MemAvailable"] / found["MemTotal"]

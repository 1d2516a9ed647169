"""Tails: what tenants print, log and raise, told to the host's listeners while it happens."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import datetime

from dynflow.clock import SystemClock
from dynflow.failure import storable

_log = logging.getLogger(__name__)
# Events that wait for one tail. A slow tail loses what comes then, and is told how much; nobody waits for it.
_MOST_WAITING = 1_000
# And bytes of theirs: a hostile guest's events are as long as what it may print in a call.
_MOST_WAITING_TEXT = 8 * 1024 * 1024
# Seconds that tails have for what was said last.
_GRACE = 1.0
# Events told to a tail that does not wait, before others get their turn.
_AT_A_TIME = 100


@dataclass(frozen=True, slots=True)
class TailEvent:
    """One thing that a tenant's code said.

    `level` is one of `logging`'s numbers. `source` is `stdout`, `stderr`, `warnings`, `uncaught` (an exception that
    ended a call), or the name of a logger; `dynflow` where something was lost. `text` is the tenant's: whoever shows
    it takes control characters off.
    """

    worker_id: str
    isolate: str
    time: datetime
    level: int
    source: str
    text: str


Tail = Callable[[TailEvent], Awaitable[None] | None]
"""A listener, sync or async. What it raises is logged, and the next event comes all the same."""


class Tails:
    """The tails of one worker, made on the loop and in the context that they are called in. `tell` never waits."""

    def __init__(self, tails: Iterable[Tail], running: set[asyncio.Task[None]]) -> None:
        self._tails = [_Pump(tail, running) for tail in tails]
        self._clock = SystemClock()

    def __bool__(self) -> bool:
        return bool(self._tails)

    def tell(self, worker_id: str, isolate: str, level: int, source: str, text: str) -> None:
        """Tell every tail."""
        if self._tails:
            event = TailEvent(worker_id, isolate, self._clock.now(), level, storable(source), storable(text))
            for pump in self._tails:
                pump.put(event)


class _Pump:
    """Hands events to one tail, in a task that lives while there are any."""

    def __init__(self, tail: Tail, running: set[asyncio.Task[None]]) -> None:
        self._tail, self._running = tail, running
        self._waiting: deque[TailEvent] = deque()
        self._lost = self._text_waiting = 0
        self._task: asyncio.Task[None] | None = None
        # Not the loop and context of whoever speaks: that may be a workflow's, which ends before this has been told.
        self._loop, self._context = asyncio.get_running_loop(), contextvars.copy_context()

    def put(self, event: TailEvent) -> None:
        """Let the tail have `event`, when it is its turn."""
        room = _MOST_WAITING_TEXT - self._text_waiting
        if len(self._waiting) >= _MOST_WAITING or (self._waiting and size_of(event.text) > room):
            self._lost += 1
            return
        if self._lost:
            text, self._lost = f"{self._lost} events were lost: this tail was too slow for them", 0
            lost = TailEvent(event.worker_id, event.isolate, event.time, logging.WARNING, "dynflow", text)
            self._waiting.append(lost)
            self._text_waiting += size_of(text)
        self._waiting.append(event)
        self._text_waiting += size_of(event.text)
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._deliver(), context=self._context)
            self._running.add(self._task)
            self._task.add_done_callback(self._running.discard)

    async def _deliver(self) -> None:
        told = 0
        while self._waiting:
            event = self._waiting.popleft()
            self._text_waiting -= size_of(event.text)
            try:
                result = self._tail(event)
                if inspect.isawaitable(result):
                    await result
            except Exception:  # noqa: BLE001 - a listener's defect is not the tenant's matter
                _log.exception("a tail of %s failed", event.worker_id)
            told += 1
            if told % _AT_A_TIME == 0:
                await asyncio.sleep(0)


def size_of(text: str) -> int:
    """Return how many bytes `text` has."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


async def last_words(running: Collection[asyncio.Task[None]]) -> None:
    """Return when tails have heard what was said last; those that take long do not."""
    if running:
        _, late = await asyncio.wait(list(running), timeout=_GRACE)
        for task in late:
            task.cancel()

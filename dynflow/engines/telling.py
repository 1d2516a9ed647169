"""Who is told what happened to an instance, after it is durable: listeners of the engine, followers of one."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from dynflow.engines import Completed, Failed, InstanceRef, Listener, Terminated
from dynflow.engines.happened import Happened
from dynflow.engines.view import history_events
from dynflow.errors import EngineClosedError

T = TypeVar("T")
End = Completed | Failed | Terminated
# What a follower who does not keep up is kept; the file has the rest.
_MOST_KEPT = 1_000


class Follower:
    """What happened to an instance since somebody follows it."""

    def __init__(self) -> None:
        self._kept: deque[Happened] = deque(maxlen=_MOST_KEPT)
        self._changed = asyncio.Event()
        self._must_read = False

    def push(self, happened: Sequence[Happened]) -> None:
        """Keep what happened."""
        if happened:
            self._kept.extend(happened)
            self._changed.set()

    def look_again(self) -> None:
        """Have the file read."""
        self._must_read = True
        self._changed.set()

    async def after(self, cursor: int) -> list[Happened] | None:
        """Wait; return what happened after the event `cursor`, or None where the file has to be read for it."""
        await self._changed.wait()
        self._changed.clear()
        kept = sorted(self._kept)
        self._kept.clear()
        must_read, self._must_read = self._must_read, False
        found = []
        for happened in kept:
            if happened.number > cursor:
                must_read |= happened.number - len(happened.types) > cursor  # what came before was not kept
                cursor = happened.number
                found.append(happened)
        return None if must_read else found


class Telling:
    """Listeners, followers and those who wait for an end, on the engine's event loop."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._followers: dict[InstanceRef, set[Follower]] = {}
        self._ends: dict[InstanceRef, set[asyncio.Future[End | None]]] = {}

    def add_listener(self, listener: Listener) -> None:
        """Call `listener` at every event of every instance; its errors go to the loop's exception handler."""
        self._listeners.append(listener)

    @contextlib.contextmanager
    def followed(self, ref: InstanceRef) -> Iterator[Follower]:
        """Follow an instance inside of the `with` block."""
        follower = Follower()
        self._followers.setdefault(ref, set()).add(follower)
        try:
            yield follower
        finally:
            _remove(self._followers, ref, follower)

    def end_of(self, ref: InstanceRef) -> asyncio.Future[End | None]:
        """Return a future of how the instance ends; None: it was deleted. To be given to `forget` in the end."""
        end: asyncio.Future[End | None] = asyncio.get_running_loop().create_future()
        self._ends.setdefault(ref, set()).add(end)
        return end

    def forget(self, ref: InstanceRef, end: asyncio.Future[End | None]) -> None:
        """Forget that somebody waits for the end."""
        _remove(self._ends, ref, end)

    def is_heard(self, ref: InstanceRef) -> bool:
        """Whether anybody listens to or follows the instance."""
        return bool(self._listeners) or ref in self._followers

    def tell(self, ref: InstanceRef, happened: Iterable[Happened | None]) -> None:
        """Tell followers and listeners of what is durable."""
        if not self.is_heard(ref):
            return
        real = [item for item in happened if item is not None]
        for follower in self._followers.get(ref, ()):
            follower.push(real)
        for event in history_events(real) if self._listeners else ():
            for listener in self._listeners:
                try:
                    listener(ref, event)
                except Exception as error:  # noqa: BLE001 - what is durable stays true whatever a listener does
                    context = {
                        "message": f"a listener failed at {event.type} of {ref.id!r}",
                        "exception": error,
                    }
                    asyncio.get_running_loop().call_exception_handler(context)

    def ended(self, ref: InstanceRef, end: End | None) -> None:
        """Tell how an instance ended; None: it was deleted."""
        if end is None:
            self._look_again(ref)
        for future in self._ends.get(ref, ()):
            if not future.done():
                future.set_result(end)

    def close(self) -> None:
        """Let everybody look again: the engine closes."""
        for ref in self._followers:
            self._look_again(ref)
        for futures in self._ends.values():
            for future in futures:
                if not future.done():
                    future.set_exception(EngineClosedError("the engine was closed meanwhile"))

    def _look_again(self, ref: InstanceRef) -> None:
        for follower in self._followers.get(ref, ()):
            follower.look_again()


def _remove(sets: dict[InstanceRef, set[T]], ref: InstanceRef, item: T) -> None:
    sets[ref].discard(item)
    if not sets[ref]:
        del sets[ref]

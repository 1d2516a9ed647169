"""Who is told what happened to an instance, after it is durable: listeners of the engine, watchers of one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from dynflow.engines import InstanceRef, Listener
from dynflow.engines.embedded.rows import ENDS, Happened
from dynflow.engines.embedded.view import history_events


@dataclass(slots=True, eq=False)
class Watch:
    """Two flags that whoever follows an instance clears before looking and awaits after it."""

    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Telling:
    """Listeners and watchers, on the engine's event loop."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._watches: dict[InstanceRef, set[Watch]] = {}

    def add_listener(self, listener: Listener) -> None:
        """Call `listener` at every event of every instance; its errors go to the loop's exception handler."""
        self._listeners.append(listener)

    @contextlib.contextmanager
    def watch(self, ref: InstanceRef) -> Iterator[Watch]:
        """Watch an instance inside of the `with` block."""
        watch = Watch()
        self._watches.setdefault(ref, set()).add(watch)
        try:
            yield watch
        finally:
            self._watches[ref].discard(watch)
            if not self._watches[ref]:
                del self._watches[ref]

    def tell(self, ref: InstanceRef, happened: Iterable[Happened | None]) -> None:
        """Tell watchers and listeners of history rows that are durable."""
        if ref not in self._watches and not self._listeners:
            return
        real = [item for item in happened if item is not None]
        if not real:
            return
        self.wake(ref, ended=any(kind in ENDS for item in real for kind in item.types))
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

    def wake(self, ref: InstanceRef, *, ended: bool) -> None:
        """Let the watchers of an instance look again."""
        for watch in self._watches.get(ref, ()):
            watch.changed.set()
            if ended:
                watch.ended.set()

    def wake_all(self) -> None:
        """Let all watchers look again: the engine closes."""
        for ref in self._watches:
            self.wake(ref, ended=True)

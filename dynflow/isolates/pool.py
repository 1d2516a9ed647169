"""A few isolates that are kept ready, all from one zygote."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from typing import Generic, Protocol, TypeVar

from dynflow.errors import IsolateError
from dynflow.isolates.zygotes import IsolateProcess, Zygote

# Seconds until a taken isolate is replaced: by then it has loaded its code, and answered.
_FILL_AFTER = 0.015


class Connected(Protocol):
    """What the pool's user makes of a child."""

    def kill(self) -> None:
        """Stop it at once."""

    @property
    def is_usable(self) -> bool:
        """Whether nothing has gone wrong."""

    @property
    def is_alive(self) -> bool:
        """Whether its process runs."""


_Made = TypeVar("_Made", bound=Connected)


class IsolatePool(Generic[_Made]):
    """Keeps `size` forked children ready, all from one zygote; starts another where it ends.

    `connect` is called for each of them ahead of its use, too.
    """

    def __init__(
        self,
        walls: Collection[str],
        preload: Collection[str],
        size: int,
        memory: int,
        connect: Callable[[IsolateProcess], Awaitable[_Made]],
    ) -> None:
        self._walls, self._preload, self._size, self._memory = walls, preload, size, memory
        self._connect = connect
        self._zygote: Zygote | None = None
        self._starting = asyncio.Lock()
        self._ready: deque[asyncio.Task[_Made]] = deque()
        self._filling: asyncio.TimerHandle | None = None
        self.walls: list[str] = []

    async def start(self) -> None:
        """Start the zygote. Raises IsolateError where the walls cannot be put up; nothing is left then."""
        try:
            await self._live_zygote()
        except BaseException:
            # Shielded: whoever is cancelled while it starts leaves neither processes nor a control group, either.
            await asyncio.shield(self.close())
            raise
        self._fill()

    async def take(self) -> _Made:
        """Return a fresh child, connected."""
        while self._ready:
            task = self._ready.popleft()
            self._fill_later()
            try:
                child = await task
            except IsolateError:
                continue
            except asyncio.CancelledError:
                if task.done() and not task.cancelled() and task.exception() is None:
                    task.result().kill()  # it came just now
                raise
            if child.is_usable and child.is_alive:
                return child
            child.kill()
        zygote = await self._live_zygote()
        self._fill_later()  # it may be a new one
        return await self._connect(await zygote.fork())

    async def close(self) -> None:
        """End everything."""
        if self._filling is not None:
            self._filling.cancel()
        for task in self._ready:
            task.cancel()
        for made in await asyncio.gather(*self._ready, return_exceptions=True):
            if not isinstance(made, BaseException):
                made.kill()
        self._ready.clear()
        if self._zygote is not None:
            await self._zygote.close()
            self._zygote = None

    def _fill_later(self) -> None:
        # Not at once: the fork would compete with the very isolate that was asked for.
        if self._filling is None:
            self._filling = asyncio.get_running_loop().call_later(_FILL_AFTER, self._fill)

    def _fill(self) -> None:
        self._filling = None
        zygote = self._zygote
        while zygote is not None and not zygote.ended and len(self._ready) < self._size:
            self._ready.append(asyncio.get_running_loop().create_task(self._make_ahead(zygote)))

    async def _make_ahead(self, zygote: Zygote) -> _Made:
        return await self._connect(await zygote.fork(ahead=True))

    async def _live_zygote(self) -> Zygote:
        async with self._starting:
            if self._zygote is None or self._zygote.ended:
                if self._zygote is not None:
                    await self._zygote.close()
                self._zygote = Zygote(self._walls, self._preload, self._memory)
                self.walls = await self._zygote.start()
            return self._zygote

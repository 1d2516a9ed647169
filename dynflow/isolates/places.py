"""How many isolates the calls of one tenant have at the same time: more wait, but not where that could be for ever."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from dynflow.errors import IsolateLimitError
from dynflow.isolates import current_caller

# Seconds that a call waits for a place. What keeps them all may be what the caller holds itself: results that live
# in isolates.
_PATIENCE = 60.0


class Places:
    """Places for calls, `most` for each tenant. A tenant without calls costs nothing.

    *Concurrency*: one event loop; who waits gets a place in the order of asking. *Cancellation*: who was cancelled has
    no place. *Errors*: IsolateLimitError after a minute; and at once for a call that is made inside of another one, for
    of a worker that calls itself each would wait for the one before.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: dict[str, int] = {}
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def take(self, tenant: str) -> Callable[[], None]:
        """Take a place; return what gives it back, once."""
        if self._taken.get(tenant, 0) < self._most:
            self._taken[tenant] = self._taken.get(tenant, 0) + 1
        elif current_caller.get(None) is not None:
            raise self._full()
        else:
            await self._wait(tenant)
        has_place = True

        def give_back() -> None:
            nonlocal has_place
            if has_place:
                has_place = False
                self._give_back(tenant)

        return give_back

    async def _wait(self, tenant: str) -> None:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(tenant, deque())
        waiting.append(place)
        try:
            async with asyncio.timeout(_PATIENCE):
                await place
        except (TimeoutError, asyncio.CancelledError) as error:
            if place.done() and not place.cancelled():  # it came just now
                self._give_back(tenant)
            elif place in waiting:
                waiting.remove(place)
                if not waiting:
                    self._waiting.pop(tenant, None)
            raise self._full() if isinstance(error, TimeoutError) else error from None

    def _give_back(self, tenant: str) -> None:
        waiting = self._waiting.get(tenant)
        while waiting:
            place = waiting.popleft()
            if not waiting:
                del self._waiting[tenant]
            if not place.done():
                place.set_result(None)
                return
        self._taken[tenant] -= 1
        if not self._taken[tenant]:
            del self._taken[tenant]

    def _full(self) -> IsolateLimitError:
        text = f"this call needs more than the {self._most:,} isolates that calls of one tenant have at the same time"
        return IsolateLimitError("isolates", self._most, text)

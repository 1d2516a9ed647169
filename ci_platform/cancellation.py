"""From asyncio's cancellation to anyio's: what a shield protects is then protected.

Attempts of steps are asyncio tasks, and are cancelled as those are: `task.cancel()` raises at whatever the task
awaits, also inside `CancelScope(shield=True)`, and a second one interrupts what cleans up after the first. Work
that has sections which must not be cut in two (a layer that is being kept, a process tree that is being killed)
runs behind this door.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

T = TypeVar("T")


async def with_shields(work: Callable[[], Awaitable[T]]) -> T:
    """Await `work()` in a task of its own, in a copy of this context.

    However often the caller is cancelled, the work is cancelled through its scope, which shields hold off; the
    cancellation leaves when the work has ended.
    """
    scope = anyio.CancelScope()

    async def body() -> T | None:
        with scope:
            return await work()
        return None

    task = asyncio.ensure_future(body())
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
            scope.cancel()
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # what went wrong while it ended has been logged where it happened
        raise cancelled
    return task.result()  # type: ignore[return-value]  # None only where the scope was cancelled

"""What in a segment can move by itself: calls that are being performed, and parts such as an isolate's session."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

# How long the tasks of a segment that is over may take to end; code that refuses its cancellation is left behind.
_GRACE = 10.0


class Part:
    """One part that can make progress by itself (see dynflow.isolates.Activity), active from the start."""

    def __init__(self, liveness: Liveness) -> None:
        self._liveness, self._is_active = liveness, True
        liveness.active_parts += 1

    def active(self) -> None:
        """Say that it moves, or is about to."""
        if not self._is_active:
            self._is_active = True
            self._liveness.active_parts += 1

    def idle(self) -> None:
        """Say that it cannot move until a call is answered."""
        if self._is_active:
            self._is_active = False
            self._liveness.active_parts -= 1
            self._liveness.look()

    close = idle


class Liveness:
    """Counts what is active, and has `look` called whenever that may have become nothing."""

    def __init__(self, look: Callable[[], None], host: asyncio.AbstractEventLoop) -> None:
        self.look, self._host = look, host
        self.active_parts, self.active_calls = 0, 0
        self.calls: dict[asyncio.Task[None], Any] = {}
        """The key of each call that is being performed or waits."""
        self.keys: set[Any] = set()

    def part(self) -> Part:
        """Return a part of its own."""
        return Part(self)

    def begin(self, key: Any) -> None:
        """Say that a call is being performed, for now without a task; `end` says when no more."""
        self.active_calls += 1
        self.keys.add(key)

    def end(self, key: Any) -> None:
        """Say that a call has been performed, or is given a task."""
        self.keys.discard(key)
        self.active_calls -= 1

    def start(
        self, work: Coroutine[Any, Any, None], key: Any, context: contextvars.Context | None = None
    ) -> asyncio.Task[None]:
        """Perform a call in a task; `work` says when it is `over`."""
        self.begin(key)
        task = self._host.create_task(work, context=context)
        self.calls[task] = key
        return task

    def over(self, task: asyncio.Task[None] | None = None) -> None:
        """Say that the call of this task, or else of the current one, has been performed."""
        key = self.calls.pop(task or asyncio.current_task(), None)  # type: ignore[arg-type]
        if key is not None:
            self.end(key)

    def stop(self, task: asyncio.Task[None]) -> None:
        """Cancel a call."""
        if inspect.getcoroutinestate(task.get_coro()) == inspect.CORO_CREATED:  # type: ignore[arg-type]
            self.over(task)  # it never begins, so it cannot say so
        task.cancel()

    async def inactive(self, future: asyncio.Future[None]) -> None:
        """Await what only `resolve` resolves; the current call does not move meanwhile."""
        self.active_calls -= 1
        self.look_later()
        try:
            await future
        except asyncio.CancelledError:
            self.active_calls += future.cancelled()
            raise

    def resolve(self, future: asyncio.Future[None]) -> None:
        """Let a call go on."""
        # Active from here and not from when its task goes on: nothing may look and find it idle in between.
        if not future.done():
            self.active_calls += 1
            future.set_result(None)

    def look_later(self) -> None:
        """Look later in this turn of the loop: whoever awaited a call goes on first and says that it is active."""
        self._host.call_soon(self.look)

    def handed_over(self) -> None:
        """Say that a call has just been answered. It stays active until whoever awaited it has gone on.

        An isolate may say in between that it waits: it has not been sent the answer yet.
        """
        self.active_calls += 1
        self._host.call_soon(self._taken)

    def _taken(self) -> None:
        self.active_calls -= 1
        self.look()

    async def close(self, others: Iterable[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
        """End all calls and `others`; returns the tasks that refuse."""
        left = {*others, *self.calls}
        for task in left:
            task.cancel()
        if left:  # sandboxes and isolates end in these tasks; the segment is over when they are gone
            _, left = await asyncio.wait(left, timeout=_GRACE)
        return left

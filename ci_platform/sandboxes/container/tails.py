"""What a command in a warm container prints, passed on until the command, its time or its output is over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
import anyio.lowlevel

from ci_platform.sandboxes import Output, StopReason
from ci_platform.sandboxes.container.places import Pipe

T = TypeVar("T")

KILLED = 128 + 9
"""The exit code of a command that its limits have ended."""

_PIECE = 32 * 1024


class Tail:
    """Passes on what a command prints, up to a limit in bytes."""

    def __init__(self, pipe: Pipe, limit: int, output: Output) -> None:
        self._pipe, self._left, self._output = pipe, limit, output

    async def until_over(
        self, wait: Callable[[], Awaitable[T]], seconds: float
    ) -> tuple[T | None, StopReason]:
        """Pass on until `wait` returns what it does, or until a limit: then None, and which one."""
        found: list[T] = []

        async def work() -> None:
            found.append(await wait())
            tasks.cancel_scope.cancel()

        reason: StopReason = "timeout"
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(work)
                with anyio.move_on_after(seconds):
                    await self._follow()
                    reason = "output"
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        within = await self._rest()
        if not found:
            return None, reason
        return found[0], "exited" if within else "output"

    async def repeat(self) -> None:
        """Pass on what an earlier process has taken already."""
        for piece in self._pipe.kept():
            self._pass_on(piece)
            await anyio.lowlevel.checkpoint()

    async def _follow(self) -> None:
        while True:
            await anyio.wait_readable(self._pipe.reader)
            if not self._more():
                return

    async def _rest(self) -> bool:
        while self._pipe.pending():
            if not self._more():
                return False
            await anyio.lowlevel.checkpoint()
        return True

    def _more(self) -> bool:
        if not self._left:
            return not self._pipe.pending()
        self._pass_on(self._pipe.take(min(_PIECE, self._left)))
        return True

    def _pass_on(self, piece: bytes) -> None:
        self._left -= len(piece)
        if piece:
            self._output(piece)

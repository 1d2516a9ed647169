"""The platform's end of one isolate sandbox: it gives the job, reads what is printed, hears how it ended."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

import anyio

from ci_platform.egress.records import WayOut
from ci_platform.errors import UnavailableError
from ci_platform.sandboxes import SANDBOX_UID, Output, SandboxLimits, StopReason, messages

_PIECE = 32 * 1024
"""Bytes read at a time: what is done with them keeps the event loop busy, 10 ms if they are empty lines."""


class StaleError(Exception):
    """The berth is older than a mount that the job's tree is on, or died with its launcher."""


class Berth:
    """The platform's end of one prepared sandbox."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._prepared = False
        self.listener = -1
        """Where the command's connections to its gateway come in. -1 until it is prepared."""

    async def prepared(self) -> bool:
        """Wait until it is ready for a job. False: it is gone. UnavailableError: the host does not let us."""
        if not self._prepared:
            answer, files = await self._answer() or (None, [])
            self.listener = next(iter(files), -1)
            if answer is not None and "error" in answer:
                raise UnavailableError(f"isolate sandbox: cannot prepare one: {answer['error']}")
            self._prepared = answer is not None
        return self._prepared

    def start(self, message: dict[str, Any], way_out: WayOut | None) -> int:
        """Send the job; returns the reading end of what its command prints, which does not block.

        From here on, the way out is in the hands of its gateway, if there is one.
        """
        self._close_listener()
        lifeline = [] if way_out is None else [way_out.lifeline.fileno()]
        reading, writing = os.pipe()
        try:
            if os.geteuid() == 0:
                # So that the command may open /dev/stdout and /dev/stderr by name.
                os.fchown(writing, SANDBOX_UID, SANDBOX_UID)
            messages.send(self._channel, message, [writing, *lifeline])
        except OSError as error:
            os.close(reading)
            raise StaleError(f"it ended before its job came: {error}") from error
        finally:
            os.close(writing)
            if way_out is not None:
                way_out.handed_over()
        os.set_blocking(reading, False)
        return reading

    def kill(self) -> None:
        """Have the supervisor kill what still runs; its answer comes as usual."""
        # OSError: it has ended by itself.
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_WR)

    async def ended(self) -> None:
        """Wait until the supervisor has something to say."""
        await anyio.wait_readable(self._channel)

    async def end(self) -> dict[str, Any]:
        """Wait until nothing is left and return how it ended. Not cancellable."""
        with anyio.CancelScope(shield=True):
            answer, _ = await self._answer() or (None, [])
        if answer is None:
            raise UnavailableError("isolate sandbox: its supervisor ended unexpectedly")
        if "stale" in answer:
            raise StaleError(answer["stale"])
        if "error" in answer:
            raise UnavailableError(f"isolate sandbox: {answer['error']}")
        return answer

    def close(self) -> None:
        """Let go of it; a supervisor that still runs kills everything and ends."""
        self._close_listener()
        self._channel.close()

    def _close_listener(self) -> None:
        if self.listener >= 0:
            os.close(self.listener)
            self.listener = -1

    async def _answer(self) -> tuple[dict[str, Any], list[int]] | None:
        await anyio.wait_readable(self._channel)
        return messages.receive(self._channel)


class Stream:
    """What a command prints, passed on up to a limit."""

    def __init__(self, fd: int, limit: int, output: Output) -> None:
        self._fd, self._left, self._output = fd, limit, output

    async def drain(self) -> bool:
        """Pass on what comes until the last writer is gone; False where that is more than the limit."""
        while self._left >= 0:
            await anyio.wait_readable(self._fd)
            if self._pass_on():
                return True
        return False

    def finish(self) -> None:
        """Pass on what the ended command left in the pipe, and close it."""
        while self._left >= 0 and not self._pass_on():
            pass
        os.close(self._fd)

    def _pass_on(self) -> bool:
        """Pass on one piece; returns whether the stream is at its end."""
        try:
            piece = os.read(self._fd, _PIECE)
        except BlockingIOError:
            return False
        if piece and self._left > 0:
            self._output(piece[: self._left])
        # Below zero: there was more than the limit.
        self._left -= len(piece)
        return not piece


async def follow(berth: Berth, stream: Stream, limits: SandboxLimits) -> StopReason:
    """Pass on what a command prints until it ends; returns what its end is due to."""
    with anyio.move_on_after(limits.timeout.total_seconds()):
        if not await stream.drain():
            return "output"
        # A command may close its output and go on.
        await berth.ended()
        return "exited"
    return "timeout"

"""The platform's end of one isolate sandbox: it gives the job, reads what is printed, hears how it ended."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel

from ci_platform.egress.records import Records, WayOut
from ci_platform.errors import UnavailableError
from ci_platform.sandboxes import Output, doors, messages, watch

_DOOR = "supervisor"
_PIECE = 32 * 1024
"""Bytes read at a time: what is done with them keeps the event loop busy, 10 ms if they are empty lines."""

_ANSWER_WITHIN = 10.0
"""Seconds for a supervisor that has been found to say hello: it has little else to do."""


class StaleError(Exception):
    """The berth is older than a mount that the job's tree is on, or died with its launcher."""


class Spool:
    """The file of a command's output, which its supervisor writes; passed on in pieces as it grows.

    With it the command's connections, if it has any.
    """

    def __init__(self, file: int, output: Output, records: Records | None) -> None:
        self._file, self._output, self._records, self._offset = file, output, records, 0

    async def pass_on(self) -> None:
        """Pass on what is new."""
        while self._pass_on_piece():
            await anyio.lowlevel.checkpoint()

    def pass_on_rest(self) -> None:
        """Pass on what is new, without a moment for others: for the end of a command that is being cancelled."""
        while self._pass_on_piece():
            pass

    def _pass_on_piece(self) -> bool:
        if self._records is not None:
            self._records.tell_new()
        piece = os.pread(self._file, _PIECE, self._offset)
        if piece:
            self._offset += len(piece)
            self._output(piece)
        return len(piece) == _PIECE


class Berth:
    """The platform's end of one prepared sandbox, or of one whose command has been found again."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._prepared = False
        self.is_settling = False
        """Whether the kernel is not done yet with what the command has looked at, when it is over."""
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

    def start(self, job: dict[str, Any], files: dict[str, int], way_out: WayOut | None) -> None:
        """Send the job with its files. From here on, the way out is in the hands of its gateway."""
        self._close_listener()
        if way_out is not None:
            files = files | {"lifeline": way_out.lifeline.fileno(), "records": way_out.file}
        try:
            messages.send(self._channel, job | {"files": list(files)}, list(files.values()))
        except OSError as error:
            raise StaleError(f"it ended before its job came: {error}") from error
        finally:
            if way_out is not None:
                way_out.handed_over()

    async def follow(self, spool: Spool) -> dict[str, Any]:
        """Pass on what the command prints until it ends; returns how it did."""
        while True:
            answer = await self._answer()
            if answer is None:
                raise UnavailableError("isolate sandbox: its supervisor ended unexpectedly")
            told = answer[0]
            if "stale" in told:
                raise StaleError(told["stale"])
            if "error" in told:
                raise UnavailableError(f"isolate sandbox: {told['error']}")
            await spool.pass_on()
            if told:
                self.is_settling = bool(told.get("settling"))
                return told

    async def settled(self) -> None:
        """Wait until nothing is left of the mounts of a command that is over."""
        with contextlib.suppress(OSError, ValueError):
            while (answer := await self._answer()) is not None and "settled" not in answer[0]:
                pass

    def has_news(self) -> bool:
        """Whether there is something to hear, if only that the supervisor is gone."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        return bool(poll.poll(0))

    async def kill(self, spool: Spool) -> None:
        """Have the supervisor kill what runs, and wait until nothing is left. Not cancellable."""
        with anyio.CancelScope(shield=True), contextlib.suppress(UnavailableError, StaleError, OSError):
            messages.send(self._channel, {"kill": True})
            await self.follow(spool)
            self.heard()

    def heard(self) -> None:
        """Tell the supervisor that its command's end is taken care of; it need not wait for anybody."""
        with contextlib.suppress(OSError):
            messages.send(self._channel, {"heard": True})

    def moved(self) -> Berth:
        """Return another holder of the same sandbox, which closing this one leaves open."""
        return Berth(self._channel.dup())

    def close(self) -> None:
        """Let go of it. Its supervisor kills everything and ends, unless its command may survive us."""
        self._close_listener()
        self._channel.close()

    def _close_listener(self) -> None:
        if self.listener >= 0:
            os.close(self.listener)
            self.listener = -1

    async def _answer(self) -> tuple[dict[str, Any], list[int]] | None:
        await anyio.wait_readable(self._channel)
        return messages.receive(self._channel)


def listen(folder: Path) -> socket.socket:
    """Return the socket in `folder` at which a supervisor will be found."""
    return doors.listen(folder, _DOOR)


def find(folder: Path) -> tuple[Berth, list[int]] | None:
    """Return the end of a supervisor that an earlier process has left in `folder`, and its files. Blocks a moment."""
    try:
        channel = doors.connect(folder, _DOOR, _ANSWER_WITHIN)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        received = messages.receive(channel)
        if received is not None and received[0].get("hello") == watch.VERSION:
            return Berth(channel), received[1]
    with contextlib.suppress(OSError):
        messages.send(channel, {"kill": True})
        messages.send(channel, {"heard": True})
    channel.close()
    return None

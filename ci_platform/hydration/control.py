"""How a server of a tree is asked for mounts, and for whether all is well. Stdlib only.

One thread beside the one that answers the kernel. It ends the program when an answer takes too long.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from ci_platform.sandboxes import doors, linux, messages

_EVERY = 1.0
"""Seconds between two looks at whether an answer takes too long."""

_DOOR = "control"
_ANSWERS_WITHIN = 10.0
"""Seconds that a caller waits for each answer."""

_WORD = "ended"
_ATTRIBUTES = linux.ATTR_RDONLY | linux.ATTR_NOSUID | linux.ATTR_NODEV
_STUCK = 70
"""What it exits with then."""


class Served(Protocol):
    """What is asked about: since when it works at an answer, what of its answers had to be an error."""

    busy_since: float | None
    trouble: str | None

    def abort(self) -> None:
        """End what it does."""


class Control:
    """The socket in `folder`. `stuck_after` is how many seconds one answer may take: who waits for it cannot be killed.

    While anybody is connected, the first of whom is `channel`, there is a mount to give.
    """

    def __init__(self, folder: Path, served: Served, channel: socket.socket, stuck_after: float) -> None:
        self._target, self._served, self._stuck_after = str(folder / "mount"), served, stuck_after
        self._folder, self._listener = folder, listen(folder)
        self._callers = {channel.fileno(): channel}
        self._mounted, self._outlived = True, False
        self._ended, self._alone = threading.Event(), threading.Event()
        messages.send(channel, {"ready": os.getpid()})

    def serve(self) -> None:
        """Answer, and watch, as long as the program lives."""
        while True:
            ready, _, _ = select.select([self._listener, *self._callers.values()], [], [], _EVERY)
            since = self._served.busy_since
            if since is not None and time.monotonic() - since > self._stuck_after:
                self._served.abort()
                os._exit(_STUCK)
            for each in ready:
                if each is self._listener:
                    caller, _ = each.accept()
                    caller.settimeout(_EVERY)
                    self._callers[caller.fileno()] = caller
                    self._alone.clear()
                else:
                    self._hear(each)
            if not self._callers and not self._alone.is_set():
                self._be_alone()

    def _be_alone(self) -> None:
        """Let go of the mount: now commands alone keep the program alive, and a later platform asks how it went."""
        if self._mounted:
            self._mounted = False
            with contextlib.suppress(OSError):
                linux.unmount(self._target, linux.MNT_DETACH)
        self._outlived = not self._ended.wait(_EVERY / 2)
        self._alone.set()

    def end(self) -> None:
        """Wait until nobody is connected, after the last mount has gone; leave a word for who may still ask."""
        self._ended.set()
        self._alone.wait()
        if self._outlived:
            (self._folder / _WORD).write_text(json.dumps({"trouble": self._served.trouble}))
        (self._folder / _DOOR).unlink(missing_ok=True)
        (self._folder / "mount").rmdir()
        if not self._outlived:
            self._folder.rmdir()

    def _hear(self, caller: socket.socket) -> None:
        try:
            received = messages.receive(caller)
            if received is None:
                self._drop(caller)
                return
            for file in received[1]:
                os.close(file)
            state = {"pid": os.getpid(), "trouble": self._served.trouble}
            if not received[0].get("mount"):
                messages.send(caller, state)
            elif self._mounted:
                mounted = linux.detached(self._target, _ATTRIBUTES)
                try:
                    messages.send(caller, state, [mounted])
                finally:
                    os.close(mounted)
            else:
                messages.send(caller, state | {"error": "it is being ended"})
        except (OSError, ValueError):
            self._drop(caller)

    def _drop(self, caller: socket.socket) -> None:
        del self._callers[caller.fileno()]
        caller.close()


def last_word(folder: Path) -> dict[str, Any] | None:
    """Return how it went in a program that has ended when no platform was there; None where that is not known."""
    try:
        found: dict[str, Any] = json.loads((folder / _WORD).read_text())
    except (OSError, ValueError):
        return None
    return found


def last_word_at(folder: Path) -> float:
    """Return when that was, in seconds since the epoch; 0 where there is no word."""
    try:
        return (folder / _WORD).stat().st_mtime
    except OSError:
        return 0.0


def listen(folder: Path) -> socket.socket:
    """Return the socket in `folder` at which the program is found."""
    return doors.listen(folder, _DOOR)


def connect(folder: Path) -> socket.socket:
    """Return a connection to the program of `folder`; OSError where it is gone."""
    return doors.connect(folder, _DOOR, _ANSWERS_WITHIN)

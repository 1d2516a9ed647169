"""Bytes between two sockets, counted and bounded. Stdlib only; a thread for each direction.

One thread for both could wait for a server to read while the server waits for it to do the same.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

_PIECE = 64 * 1024
_LOOK_EVERY = 5.0
"""Seconds between two looks at the other direction, and at what the command's other connections have used."""

SPENT = "the command's limit of bytes is used up"


class Budget:
    """Bytes that all connections of a command share."""

    def __init__(self, left: int) -> None:
        self._left, self._lock = left, threading.Lock()

    def spend(self, count: int) -> bool:
        """Take `count` bytes; False where there are none left."""
        with self._lock:
            self._left -= count
            return self._left >= 0

    @property
    def is_spent(self) -> bool:
        """Whether nothing is left."""
        return self._left <= 0


class Tunnel:
    """One connection: `client` in the sandbox, `server` outside.

    `sent` and `received` are the bytes that went through, `cut` says why it was ended early.
    """

    def __init__(self, client: socket.socket, server: socket.socket, budget: Budget, idle: float) -> None:
        self._client, self._server, self._budget, self._idle = client, server, budget, idle
        self._moved_at = time.monotonic()
        self.sent = self.received = 0
        self.cut = ""
        for end in (client, server):
            end.settimeout(idle)

    def run(self, early: bytes) -> None:
        """Send the server `early`, then pass bytes on until both sides have said all."""
        back = threading.Thread(target=self._pump, args=(self._server, self._client), daemon=True)
        back.start()
        if self._pass(early, self._server):
            self._pump(self._client, self._server)
        back.join()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        poll = select.poll()
        poll.register(source, select.POLLIN)
        try:
            while not self.cut:
                if not poll.poll(min(self._idle, _LOOK_EVERY) * 1000):
                    self._judge()
                elif not (piece := source.recv(_PIECE)):
                    break
                elif not self._pass(piece, target):
                    return
        except OSError:
            # Who has what it wanted often just goes.
            self._end()
            return
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _pass(self, piece: bytes, target: socket.socket) -> bool:
        """Send a piece; False where the connection is over."""
        self._moved_at = time.monotonic()
        if not self._budget.spend(len(piece)):
            self._end(SPENT)
            return False
        try:
            target.sendall(piece)
        except TimeoutError:
            self._end(f"one side took nothing for {self._idle:.3g} s")
            return False
        except OSError:
            self._end()
            return False
        if target is self._client:
            self.received += len(piece)
        else:
            self.sent += len(piece)
        return True

    def _judge(self) -> None:
        if time.monotonic() - self._moved_at >= self._idle:
            self._end(f"nothing came for {self._idle:.3g} s")
        elif self._budget.is_spent:
            self._end(SPENT)

    def _end(self, why: str = "") -> None:
        self.cut = self.cut or why
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

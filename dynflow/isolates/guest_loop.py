"""The event loop of a guest: one socket, no threads, no children. Stdlib only."""

from __future__ import annotations

import asyncio
import select
import socket
from asyncio.base_events import BaseEventLoop
from collections.abc import Callable
from typing import Any

_READ = 256 * 1024
_FLUSH_AT = 64 * 1024
_NO_THREADS = "isolates have no threads: await a capability, or do the work right here"


class GuestLoop(BaseEventLoop):
    """An event loop over one socket, that says so before it waits.

    It is its own selector: no epoll, no self-pipe, so that the system-call filter can be short.
    """

    def __init__(self) -> None:
        super().__init__()
        self._selector = self
        self._socket: socket.socket | None = None
        self._connect: Callable[[], socket.socket] | None = None
        self._out = bytearray()
        self._poll = select.poll()
        self._on_data: Callable[[bytes], None] = _nothing
        self._before_wait: Callable[[float | None], None] = _nothing

    def attach(
        self,
        connect: Callable[[], socket.socket],
        on_data: Callable[[bytes], None],
        before_wait: Callable[[float | None], None],
    ) -> None:
        """Read from what `connect` returns; `on_data(b"")` is the end of the stream.

        It is called once the loop runs and has nothing to do, and may return in another process, a fork.
        """
        self._connect, self._on_data, self._before_wait = connect, on_data, before_wait

    def _begin(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = None
        self._socket = connect()
        self._poll.register(self._socket, select.POLLIN)
        asyncio._set_running_loop(self)  # noqa: SLF001 - public; asyncio remembers for which process it was

    def write(self, data: bytes) -> None:
        """Send `data` at the end of this turn of the loop, or at once when much has gathered."""
        self._out += data
        if len(self._out) > _FLUSH_AT:
            self.flush()

    def flush(self) -> None:
        """Send what has gathered."""
        if self._out and self._socket is not None:
            data, self._out = self._out, bytearray()
            self._socket.sendall(data)

    def wait_here(self, future: asyncio.Future[Any]) -> Any:
        """Return the future's result, without letting anything else of this loop run: for code that is not async.

        Raises ConnectionError where the host is gone.
        """
        while not future.done():
            if self._socket is None:
                raise ConnectionError("there is no host to ask")
            self._before_wait(None)
            self.flush()
            data = self._socket.recv(_READ)
            self._on_data(data)
            if not data:
                raise ConnectionError("the host is gone")
        return future.result()

    # --- what BaseEventLoop asks of a selector and of its subclass ---

    def select(self, timeout: float | None) -> list[bytes]:
        """Return what arrived, within `timeout` seconds (None: whenever it comes)."""
        if self._connect is not None:
            self._begin(self._connect)
        if self._socket is None:
            return []
        try:
            return [self._socket.recv(_READ, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            pass
        if timeout is not None and timeout <= 0:
            self.flush()
            return []
        self._before_wait(timeout)
        self.flush()
        if self._stopping:  # type: ignore[attr-defined]  # BaseEventLoop's, set by stop()
            return []
        if timeout is not None and not self._poll.poll(timeout * 1000 + 1):
            return []
        return [self._socket.recv(_READ)]

    def _process_events(self, event_list: list[bytes]) -> None:
        for data in event_list:
            self._on_data(data)

    def _write_to_self(self) -> None:
        pass  # nobody else can wake this loop: there are no threads

    def run_in_executor(self, *_: Any) -> Any:  # type: ignore[override]
        """Refuse."""
        raise RuntimeError(_NO_THREADS)


def _nothing(_: Any) -> None:
    pass

"""The gateway of one command: a process on the host's network, without privileges. Stdlib only.

It takes connections from the one socket that listens inside of the sandbox's network namespace, a thread each, and
appends a line to `records` for each of them. It ends with its command's supervisor, at the other end of `lifeline`.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ci_platform.egress import Connection, GatewayLimits
from ci_platform.egress.policy import Policy
from ci_platform.egress.requests import LARGEST_HEAD, BadRequestError, Request, parse
from ci_platform.egress.tunnels import Budget, Tunnel

_STACK = 256 * 1024
_MOST_ADDRESSES = 4
"""Of one name that are tried."""

_GOODBYE_WITHIN = 2.0
"""Seconds for open connections to write their record, once the command is over."""

Resolve = Callable[[str, int], Sequence[tuple[int, str]]]
"""Returns (family, address) of a host. Raises OSError."""


def resolve(host: str, port: int) -> list[tuple[int, str]]:
    """Look a host up as this machine does; numbers in any notation come back as addresses."""
    found = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def is_this_machine(family: int, address: str) -> bool:
    """Whether an address is one of this machine's own, where services listen that are meant for itself."""
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: the kernel takes an address for a socket only where it is its own.
        probe.bind((address, 0))
        return True
    return False


class Gateway:
    """Serves one command's connections until `lifeline` is shut down at its other end."""

    def __init__(
        self,
        listener: socket.socket,
        lifeline: socket.socket,
        records: int,
        policy: Policy,
        limits: GatewayLimits = GatewayLimits(),  # noqa: B008 - frozen
        look_up: Resolve = resolve,
    ) -> None:
        self._listener, self._lifeline, self._records = listener, lifeline, records
        self._policy, self._limits, self._resolve = policy, limits, look_up
        self._slots = threading.Semaphore(limits.at_once)
        self._budget = Budget(limits.bytes)
        self._lock = threading.Lock()
        self._open: set[threading.Thread] = set()
        self._sockets: set[socket.socket] = set()
        self._over = self._ended = False

    def serve(self) -> None:
        """Accept connections until the command is over, then end what is open."""
        poll = select.poll()
        poll.register(self._lifeline, select.POLLIN | select.POLLRDHUP)
        poll.register(self._listener, select.POLLIN)
        left = self._limits.connections
        while not any(fd == self._lifeline.fileno() for fd, _ in poll.poll()):
            if not self._slots.acquire(timeout=0.2):
                continue
            try:
                client, _ = self._listener.accept()
            except OSError:
                self._slots.release()
                continue
            left -= 1
            if left < 0:
                client.close()
                self._slots.release()
                if left == -1:
                    why = f"the command has made {self._limits.connections:,} connections already"
                    self._record(Connection("", 0, why))
                continue
            self._start(client)
        self._end()

    def _start(self, client: socket.socket) -> None:
        thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
        with self._lock:
            self._open.add(thread)
            self._sockets.add(client)
        thread.start()

    def _end(self) -> None:
        self._listener.close()
        with self._lock:
            self._over = True
            threads = list(self._open)
            for each in self._sockets:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        until = time.monotonic() + _GOODBYE_WITHIN
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        with self._lock:
            self._ended = True

    def _serve(self, client: socket.socket) -> None:
        started = time.monotonic()
        try:
            with client:
                record = self._handle(client)
            if record is not None:
                self._record(replace(record, seconds=round(time.monotonic() - started, 6)))
        except OSError:
            pass  # the client is gone before it said what it wants
        finally:
            with self._lock:
                self._open.discard(threading.current_thread())
                self._sockets.discard(client)
            self._slots.release()

    def _record(self, record: Connection) -> None:
        # One short line in one call: lines of threads do not mix.
        with self._lock, contextlib.suppress(OSError):
            if self._ended:
                return  # it looked a name up all the time: `records` is closed, and may be the number of another file
            os.write(self._records, record.as_line())
            self._lifeline.send(b".", socket.MSG_DONTWAIT)

    def _handle(self, client: socket.socket) -> Connection | None:
        """Serve one client; returns what is to be told of it."""
        head, rest = _read_head(client, self._limits.head)
        if not head:
            return None
        try:
            request = parse(head)
        except BadRequestError as error:
            _answer(client, "400 Bad Request", str(error))
            return Connection("", 0, str(error))
        record = Connection(request.host, request.port)
        why = self._policy.why_not_host(request.host, request.port)
        server, record = (None, replace(record, refused=why)) if why else self._connect(request, record)
        if server is None:
            _answer(client, "403 Forbidden" if not record.address else "502 Bad Gateway", str(record))
            return record
        with server:
            return self._pass_on(client, server, request, rest, record)

    def _pass_on(
        self, client: socket.socket, server: socket.socket, request: Request, rest: bytes, record: Connection
    ) -> Connection:
        with self._lock:
            if self._over:
                return record
            self._sockets.add(server)
        try:
            tunnel = Tunnel(client, server, self._budget, self._limits.idle)
            if request.tunnel:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            tunnel.run(request.forward + rest)
            return replace(record, cut=tunnel.cut, sent=tunnel.sent, received=tunnel.received)
        finally:
            with self._lock:
                self._sockets.discard(server)

    def _connect(self, request: Request, record: Connection) -> tuple[socket.socket | None, Connection]:
        """Look up, judge each address, connect to one that was judged."""
        try:
            found = self._resolve(request.host, request.port)
        except OSError as error:
            return None, replace(record, refused=f"it cannot be looked up: {error.strerror or error}")
        refused = "it has no address"
        for family, address in found[:_MOST_ADDRESSES]:
            refused = self._why_not(request, family, address)
            if refused:
                continue
            record = replace(record, address=address)
            try:
                return self._dial(family, address, request.port), record
            except OSError as error:
                refused = f"{address} does not answer: {error.strerror or error}"
        return None, replace(record, refused=refused)

    def _why_not(self, request: Request, family: int, address: str) -> str:
        why = self._policy.why_not_address(request.host, request.port, address)
        if why or self._policy.is_inner(request.host, request.port):
            return why
        return f"{address} is an address of this machine" if is_this_machine(family, address) else ""

    def _dial(self, family: int, address: str, port: int) -> socket.socket:
        server = socket.socket(family, socket.SOCK_STREAM)
        try:
            server.settimeout(self._limits.connect)
            server.connect((address, port))
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            server.close()
            raise
        return server


def _read_head(client: socket.socket, within: float) -> tuple[bytes, bytes]:
    """Return a request's head and what came after it; nothing where it does not come in time."""
    data, until = bytearray(), time.monotonic() + within
    while (end := data.find(b"\r\n\r\n")) < 0:
        left = until - time.monotonic()
        if left <= 0 or len(data) > LARGEST_HEAD:
            return b"", b""
        client.settimeout(left)
        piece = client.recv(8192)
        if not piece:
            return b"", b""
        data += piece
    return bytes(data[: end + 4]), bytes(data[end + 4 :])


def _answer(client: socket.socket, status: str, text: str) -> None:
    body = text.encode() + b"\n"
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
    with contextlib.suppress(OSError):
        client.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)


def from_order(order: dict[str, Any], listener: int, lifeline: int, records: int) -> Gateway:
    """Return the gateway that the platform has ordered."""
    threading.stack_size(_STACK)
    policy = Policy(order["hosts"], order["inner"])
    limits = GatewayLimits(**order["limits"])
    return Gateway(socket.socket(fileno=listener), socket.socket(fileno=lifeline), records, policy, limits)

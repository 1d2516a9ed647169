"""Git's smart protocol as bytes over HTTP: request bodies, packets, answers that are passed on piece by piece."""

from __future__ import annotations

import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from typing import IO, Any, cast

import anyio
import anyio.abc
import anyio.to_thread
from litestar.connection import ASGIConnection
from litestar.types import Send

from ci_platform.errors import InvalidInputError, PlatformError, TooLargeError, UnavailableError

Connection = ASGIConnection[Any, Any, Any, Any]

_SPOOL_CHUNK = 1024 * 1024
_REQUEST_BYTES = 32 * 1024 * 1024
"""Of a fetch: what the client has and wants, 50 bytes a commit."""

_GZIP = frozenset({"gzip", "x-gzip"})


def packet(content: bytes) -> bytes:
    """Return one packet of the protocol."""
    return b"%04x" % (len(content) + 4) + content


def remark(line: str) -> bytes:
    """Return a line for whoever pushes, as git shows those of a server; it holds no control characters."""
    text = "".join(char for char in line if char.isprintable())[:500]
    return packet(b"\x02" + text.encode("utf-8", "replace") + b"\n")


def headers(media_type: str, extra: Mapping[str, str] | None = None) -> list[tuple[bytes, bytes]]:
    """Return an answer's headers. Nothing of git is to be cached."""
    found = {"content-type": media_type, "cache-control": "no-cache", **(extra or {})}
    return [(name.encode(), value.encode()) for name, value in found.items()]


async def respond(
    send: Send, status: int, media_type: str, body: bytes, extra: Mapping[str, str] | None = None
) -> None:
    """Send a whole answer."""
    found = headers(media_type, {"content-length": str(len(body)), **(extra or {})})
    await send({"type": "http.response.start", "status": status, "headers": found})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class Stream:
    """An answer in pieces. A client that takes none for `stall` seconds is given up (TimeoutError)."""

    def __init__(self, send: Send, media_type: str, stall: float) -> None:
        self._send, self._media_type, self._stall = send, media_type, stall
        self.begun = False

    async def write(self, chunk: bytes, *, more: bool = True) -> None:
        """Send a piece; the headers go before the first, so that until then the answer can be another one."""
        with anyio.fail_after(self._stall):
            if not self.begun:
                self.begun, start = True, headers(self._media_type)
                await self._send({"type": "http.response.start", "status": 200, "headers": start})
            await self._send({"type": "http.response.body", "body": chunk, "more_body": more})

    async def end(self) -> None:
        """Say that it is whole. Without that the client takes the answer for cut off."""
        await self.write(b"", more=False)


async def body(connection: Connection, limit: int, stall: float) -> AsyncGenerator[bytes]:
    """Yield the request's body, unpacked.

    TooLargeError where it is, or unfolds to, more than `limit` bytes; InvalidInputError where nothing comes for
    `stall` seconds.
    """
    encoding = connection.headers.get("content-encoding", "identity").lower()
    if encoding not in _GZIP | {"identity"}:
        raise InvalidInputError(f"requests are sent as they are or as gzip, not as {encoding[:40]!r}")
    inflate = zlib.decompressobj(wbits=31) if encoding in _GZIP else None
    total, more = 0, True
    while more:
        try:
            with anyio.fail_after(stall):
                message = await connection.receive()
        except TimeoutError:
            raise InvalidInputError(f"the request stood still for {stall:.0f} seconds: push again") from None
        if message["type"] == "http.disconnect":
            raise InvalidInputError("the request ended early")
        more = bool(message.get("more_body"))
        for chunk in _unpacked(inflate, cast("bytes", message.get("body", b""))):
            total += len(chunk)
            if total > limit:
                raise TooLargeError(f"the request has more than {limit} bytes: push fewer commits at once")
            yield chunk
    if inflate is not None and not inflate.eof:
        raise InvalidInputError("the request's gzip ends early")


def _unpacked(inflate: Any, data: bytes) -> Iterator[bytes]:
    if inflate is None:
        yield data
        return
    while data and not inflate.eof:
        try:
            yield inflate.decompress(data, _SPOOL_CHUNK)
        except zlib.error as error:
            raise InvalidInputError(f"the request is not gzip: {error}") from None
        data = inflate.unconsumed_tail


async def spool(connection: Connection, into: IO[bytes], limit: int, stall: float) -> None:
    """Put the request's body aside, and go to its beginning. No more than a mebibyte of it is in memory."""
    pending = bytearray()
    async with aclosing(body(connection, limit, stall)) as chunks:
        async for chunk in chunks:
            pending += chunk
            if len(pending) >= _SPOOL_CHUNK:
                await anyio.to_thread.run_sync(_write, into, bytes(pending))
                pending.clear()
    await anyio.to_thread.run_sync(_write, into, bytes(pending))
    into.seek(0)


def _write(into: IO[bytes], data: bytes) -> None:
    try:
        into.write(data)
        into.flush()
    except OSError as error:
        raise UnavailableError(f"the push cannot be put aside: {error.strerror}; push again later") from error


async def feed(connection: Connection, git: anyio.abc.Process, stall: float) -> PlatformError | None:
    """Give git the request, then wait for the client to go away. Returns early with what is wrong with the request."""
    assert git.stdin is not None  # noqa: S101 - asked for by the caller
    try:
        async with aclosing(body(connection, _REQUEST_BYTES, stall)) as chunks:
            async for chunk in chunks:
                await git.stdin.send(chunk)
        await git.stdin.aclose()
    except PlatformError as error:
        return error
    except anyio.BrokenResourceError:
        pass  # git has seen enough, and answers why
    while (await connection.receive())["type"] != "http.disconnect":
        pass
    return None


async def output(git: anyio.abc.Process) -> AsyncIterator[bytes]:
    """Yield what git prints, in the pieces in which it comes."""
    assert git.stdout is not None  # noqa: S101 - always a pipe
    async for chunk in git.stdout:
        yield chunk

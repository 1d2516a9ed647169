"""Server-sent events: history, then live, until the source ends, the reader goes, or the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar

from litestar.response import ServerSentEvent
from litestar.response.sse import ServerSentEventMessage

from ci_platform.errors import InvalidInputError

T = TypeVar("T")

# Proxies close connections that are silent for a minute or less; a comment now and then keeps them open.
HEARTBEAT = 15.0
# How long a browser waits before it connects again, in milliseconds.
RETRY = 1_000

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Stopping:
    """Says that the server is going down: open streams end, so that a shutdown need not wait for them."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        """End all streams."""
        self._event.set()

    async def wait(self) -> None:
        """Return once the server is going down."""
        await self._event.wait()


def last_event_id(header: str | None, *, default: int | None = None) -> int | None:
    """Return the id after which a reader wants to go on. Raises InvalidInputError for what is no number."""
    if header is None or not header.strip():
        return default
    if not (header.strip().isascii() and header.strip().isdecimal() and len(header) < 20):
        raise InvalidInputError("Last-Event-ID must be an id that this server sent, a whole number")
    return int(header)


def event_stream(messages: AsyncIterator[ServerSentEventMessage], stopping: Stopping) -> ServerSentEvent:
    """Return the response that sends `messages` as they come."""
    return ServerSentEvent(_with_heartbeat(messages, stopping), headers=_HEADERS)


async def _with_heartbeat(
    messages: AsyncIterator[ServerSentEventMessage], stopping: Stopping
) -> AsyncGenerator[ServerSentEventMessage]:
    yield ServerSentEventMessage(data=None, comment="stream", retry=RETRY)
    async for message in interruptible(messages, stopping, HEARTBEAT):
        yield ServerSentEventMessage(data=None, comment="still here") if message is None else message


async def interruptible(
    source: AsyncIterator[T], stopping: Stopping, heartbeat: float
) -> AsyncGenerator[T | None]:
    """Yield what `source` yields, and None after each `heartbeat` seconds of silence; end when told to."""
    stopped = asyncio.ensure_future(stopping.wait())
    upcoming: asyncio.Task[tuple[T] | None] | None = None
    try:
        while True:
            upcoming = upcoming or asyncio.ensure_future(_next(source))
            done, _ = await asyncio.wait(
                {upcoming, stopped}, timeout=heartbeat, return_when=asyncio.FIRST_COMPLETED
            )
            if upcoming in done:
                item = upcoming.result()
                upcoming = None
                if item is None:
                    return
                yield item[0]
            elif stopped in done:
                return
            else:
                yield None
    finally:
        await _end(stopped, upcoming)
        if isinstance(source, AsyncGenerator):
            await source.aclose()


async def _next(source: AsyncIterator[T]) -> tuple[T] | None:
    try:
        return (await anext(source),)
    except StopAsyncIteration:
        return None


async def _end(*tasks: asyncio.Future[Any] | None) -> None:
    living = [task for task in tasks if task is not None]
    for task in living:
        task.cancel()
    await asyncio.gather(*living, return_exceptions=True)

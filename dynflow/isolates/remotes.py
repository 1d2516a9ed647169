"""What is held of an object across the wire: its callers see functions, iterators, streams. Stdlib only."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, Self

from dynflow.errors import InvalidArgumentError, ValueTooLargeError
from dynflow.serialization import MEBIBYTE

Kind = Literal["function", "iterator", "stream", "instance", "object"]

# Bytes of a stream in one message, and what `read()` of the whole of it may become.
CHUNK = 256 * 1024
_WHOLE = 64 * MEBIBYTE


class Link(Protocol):
    """A stub's way to its object."""

    async def ask(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call a method of the object."""

    def release(self) -> None:
        """Say that the stub is gone."""

    def number_in(self, stubs: object) -> int | None:
        """Return the object's number where it is the other side's of `stubs`."""


class Remote:
    """An object that lives on the other side of the wire."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def number_in(self, stubs: object) -> int | None:
        """Return the object's number where it is the other side's of `stubs`."""
        return self._link.number_in(stubs)

    def __del__(self) -> None:
        link = self.__dict__.get("_link")
        if link is not None:
            link.release()


class RemoteFunction(Remote):
    """A callback of the other side: always async."""

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it over there."""
        return await self._link.ask("call", args, kwargs)


class RemoteObject(Remote):
    """An object of the other side: its public methods, all async."""

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda *args, **kwargs: self._link.ask(method, args, kwargs)


class RemoteInstance(RemoteObject):
    """The handle of an instance that the other side gave."""

    def __init__(self, link: Link, instance_id: str) -> None:
        super().__init__(link)
        self.id = instance_id


class RemoteIterator(Remote):
    """An async iterator of the other side: each item is asked for when it is wanted, so nothing piles up."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        more, item = await self._link.ask("next", (), {})
        if not more:
            raise StopAsyncIteration
        return item

    async def aclose(self) -> None:
        """End it over there."""
        await self._link.ask("close", (), {})


class RemoteStream(Remote):
    """A byte stream of the other side, read in chunks that are asked for one by one."""

    async def read(self, size: int = -1) -> bytes:
        """Return at most `size` bytes, b"" at the end; all of it where `size` is negative, up to 64 MiB."""
        if size >= 0:
            return await self._chunk(size)
        found = bytearray()
        while chunk := await self._chunk(CHUNK):
            found += chunk
            if len(found) > _WHOLE:
                raise ValueTooLargeError(f"the stream has more than {_WHOLE:,} bytes: read it in pieces")
        return bytes(found)

    async def _chunk(self, size: int) -> bytes:
        chunk = await self._link.ask("read", (size,), {})
        if type(chunk) is not bytes:
            raise InvalidArgumentError(f"a byte stream gave {type(chunk).__name__}")
        if len(chunk) > size:
            raise InvalidArgumentError("a byte stream gave more than it was asked for")
        return chunk

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        chunk = await self._chunk(CHUNK)
        if not chunk:
            raise StopAsyncIteration
        return chunk


def kind_of(value: Any) -> Kind | None:
    """Return what kind of stub `value` becomes, None where it is nothing that both sides would send."""
    if isinstance(value, Remote):
        return next(kind for kind, cls in REMOTES.items() if type(value) is cls)
    if inspect.iscoroutinefunction(getattr(type(value), "read", None)):
        return "stream"
    if hasattr(type(value), "__aiter__"):
        return "iterator"
    return "function" if callable(value) and not isinstance(value, type) else None


REMOTES: dict[Kind, type[Remote]] = {
    "function": RemoteFunction,
    "iterator": RemoteIterator,
    "stream": RemoteStream,
    "instance": RemoteInstance,
    "object": RemoteObject,
}

"""Stubs: what crosses the wire by reference. The one side keeps the object, the other holds a stub that calls it.

On the wire a stub is `{"$": ["stub", whose, kind, number, about]}`: `whose` is `mine` (the sender keeps the object),
`yours` (the sender gives back a stub of the receiver's own), or `env` (`number` is then the name of a binding in the
tenant's env, and `about` an instance's id or null). Numbers mean something between two peers only, while one call of
an entrypoint lasts. Both sides run this. Stdlib only.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynflow.errors import InvalidArgumentError, UnserializableError
from dynflow.isolates.frames import encode_frame
from dynflow.isolates.remotes import CHUNK, REMOTES, Kind, Link, Remote, RemoteInstance, kind_of
from dynflow.serialization import pack, unpack

_ENDED = "this stub has ended: it holds for the call in which it was given, and in that isolate alone"


class Kept:
    """A function, iterator or stream that was given away, and how the calls of its stub are performed."""

    def __init__(self, kind: Kind, target: Any) -> None:
        self._kind, self._target = kind, target
        self._turn = asyncio.Lock()  # an async generator takes one `next` at a time
        self._items = target.__aiter__() if kind == "iterator" else None

    def find(self, method: str) -> Callable[..., Any]:
        """Return what performs `method`. Raises InvalidArgumentError."""
        found: Callable[..., Any] | None = None
        if self._kind in {"object", "instance"} and not method.startswith("_"):
            found = getattr(self._target, method, None)
        elif (self._kind, method) == ("function", "call"):
            found = self._target
        elif (self._kind, method) in {("iterator", "next"), ("stream", "read"), ("iterator", "close")}:
            found = getattr(self, f"_{method}")
        if not callable(found):
            raise InvalidArgumentError(f"a stub of a {self._kind} has no method {method!r:.100}")
        return found

    async def _next(self) -> list[Any]:
        async with self._turn:
            try:
                return [True, await self._items.__anext__()]  # type: ignore[union-attr]  # as kind says
            except StopAsyncIteration:
                return [False, None]

    async def _close(self) -> None:
        close = getattr(self._items, "aclose", None)
        if close is not None:
            async with self._turn:
                await close()

    async def _read(self, size: int) -> Any:
        async with self._turn:
            return await self._target.read(min(max(size, 0), CHUNK))


@dataclass(frozen=True, slots=True)
class Export:
    """What was given away: the object itself, and what performs calls of its stub."""

    value: Any
    kept: Any


class Stubs:
    """What one side has given to the other, and what it holds of the other's, while one call lasts.

    `link` makes the way to an object of the other side. `own` says for a value that only this side sends what kind it
    is and what performs its calls; `refer` how the guest names what came out of its env, and `resolve` is the host's
    answer to that. `most` bounds both directions.
    """

    def __init__(
        self,
        numbers: Iterator[int],
        most: int,
        *,
        link: Callable[[Stubs, int], Link],
        own: Callable[[Any], tuple[Kind, Any] | None],
        refer: Callable[[Any], list[Any] | None] | None = None,
        resolve: Callable[[Any, Any], Any] | None = None,
        on_empty: Callable[[], None] | None = None,
    ) -> None:
        self._numbers, self._most, self._link, self._own = numbers, most, link, own
        self._refer, self._resolve, self._on_empty = refer, resolve, on_empty
        self._given: dict[int, Export] = {}
        self._held: set[int] = set()
        self.has_held = self.closed = False

    @property
    def holds(self) -> bool:
        """Whether this side holds a stub of the other's."""
        return bool(self._held)

    # --- out ---

    def pack(self, value: Any) -> Any:
        """Return `value` as serialization's `pack` does, with stubs in place of what goes by reference."""
        try:
            return pack(value)
        except UnserializableError as error:
            why = error
        before = set(self._given)
        try:
            return self._lower(value)
        except (UnserializableError, RecursionError, InvalidArgumentError) as error:
            for number in self._given.keys() - before:
                del self._given[number]
            raise (error if isinstance(error, InvalidArgumentError) else why) from None

    def _lower(self, value: Any) -> Any:
        kind = type(value)
        if kind is list:
            return [self._lower(item) for item in value]
        if kind is tuple:
            return {"$": ["tuple", *(self._lower(item) for item in value)]}
        if kind is dict and all(type(key) is str for key in value):
            lowered = {key: self._lower(item) for key, item in value.items()}
            return {"$": ["dict", lowered]} if "$" in lowered and len(lowered) == 1 else lowered
        stub = self._stub_of(value)
        return pack(value) if stub is None else {"$": ["stub", *stub]}

    def _stub_of(self, value: Any) -> list[Any] | None:
        if isinstance(value, Remote):
            number = value.number_in(self)
            if number is not None:
                return ["yours", kind_of(value), number, None]
        referred = self._refer(value) if self._refer is not None else None
        if referred is not None:
            return ["env", "object", *referred]
        own = self._own(value)
        if own is None:
            found = kind_of(value)
            if found is None:
                return None
            own = found, Kept(found, value)
        kind, kept = own
        return ["mine", kind, self._give(value, kept), value.id if kind == "instance" else None]

    def _give(self, value: Any, kept: Any) -> int:
        if len(self._given) >= self._most:
            raise InvalidArgumentError(f"more than {self._most:,} stubs are given away at a time")
        number = next(self._numbers)
        self._given[number] = Export(value, kept)
        return number

    # --- in ---

    def lift(self, data: Any) -> Any:
        """Return packed `data` with stubs made. Raises ValueError for what is malformed."""
        if type(data) is list:
            return [self.lift(item) for item in data]
        if type(data) is not dict:
            return data
        tagged = data.get("$")
        if len(data) == 1 and type(tagged) is list and tagged and tagged[0] == "stub":
            return self._lifted(*tagged[1:])
        return {key: self.lift(item) for key, item in data.items()}

    def _lifted(self, whose: Any, kind: Any, number: Any, about: Any) -> Any:
        if whose == "yours" and type(number) is int:
            return self.given(number).value
        if whose == "env" and self._resolve is not None:
            return self._resolve(number, about)
        if whose != "mine" or kind not in REMOTES or type(number) is not int or number in self._held:
            raise ValueError("not a stub")
        if len(self._held) >= self._most:
            raise ValueError(f"more than {self._most:,} stubs")
        self._held.add(number)
        self.has_held = True
        link = self._link(self, number)
        if kind == "instance":
            return RemoteInstance(link, str(about)[:100])
        return REMOTES[kind](link)

    def given(self, number: Any) -> Export:
        """Return what was given away as `number`. Raises InvalidArgumentError: it may be forged, or have ended."""
        export = self._given.get(number) if type(number) is int else None
        if export is None:
            raise InvalidArgumentError(_ENDED)
        return export

    # --- the end ---

    def release(self, number: Any) -> None:
        """Forget what was given away as `number` (0: everything): the other side has no use for it any more."""
        if type(number) is not int:
            raise ValueError("wrong types")
        if number:
            self._given.pop(number, None)
        else:
            self._given.clear()

    def dropped(self, number: int) -> bool:
        """Note that a stub of the other side's is gone here; return whether to say so."""
        if self.closed or number not in self._held:
            return False
        self._held.discard(number)
        if not self._held and self._on_empty is not None:
            self._on_empty()
        return True

    def close(self) -> None:
        """End all stubs, both ways."""
        self.closed = True
        self._given.clear()
        self._held.clear()
        if self._on_empty is not None:
            self._on_empty()


class WireLink:
    """A link through a peer: `ask` sends calls, `send_release` says that the stub is gone."""

    def __init__(
        self,
        stubs: Stubs,
        number: int,
        ask: Callable[[int, str, Sequence[Any], Mapping[str, Any]], Awaitable[Any]],
        send_release: Callable[[int], None],
    ) -> None:
        self._stubs, self._number, self._ask, self._send_release = stubs, number, ask, send_release
        self._loop = asyncio.get_running_loop()

    async def ask(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call a method of the object."""
        if self._stubs.closed:
            raise InvalidArgumentError(_ENDED)
        return await self._ask(self._number, method, args, kwargs)

    def release(self) -> None:
        """Say that the stub is gone; called by the garbage collector, so at any moment."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon(self._released)

    def number_in(self, stubs: object) -> int | None:
        """Return the object's number where it is the other side's of `stubs`."""
        return self._number if stubs is self._stubs and not self._stubs.closed else None

    def _released(self) -> None:
        if self._stubs.dropped(self._number):
            self._send_release(self._number)


class _LocalLink:
    """A link to an object in this process."""

    def __init__(self, kept: Any) -> None:
        self._kept = kept

    async def ask(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        result = self._kept.find(method)(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    def release(self) -> None:
        pass

    def number_in(self, stubs: object) -> int | None:
        del stubs
        return None


def copied(value: Any, own: Callable[[Any], tuple[Kind, Any] | None], most: int | None = None) -> Any:
    """Return `value` as a wire in this process would deliver it: copies of data, stubs of what goes by reference.

    Raises ValueTooLargeError for data of more than `most` bytes.
    """
    try:
        packed = pack(value)
    except UnserializableError as error:
        why = error
    else:
        encode_frame([packed], most)
        return unpack(packed)
    try:
        return _copied(value, own, most)
    except (UnserializableError, RecursionError):
        raise why from None


def _copied(value: Any, own: Callable[[Any], tuple[Kind, Any] | None], most: int | None) -> Any:
    kind = type(value)
    if kind is list or kind is tuple:
        return kind(_copied(item, own, most) for item in value)
    if kind is dict:
        return {key: _copied(item, own, most) for key, item in value.items()}
    found = own(value)
    if found is None:
        packed = pack(value)
        encode_frame([packed], most)
        return unpack(packed)
    link = _LocalLink(found[1])
    return RemoteInstance(link, value.id) if found[0] == "instance" else REMOTES[found[0]](link)

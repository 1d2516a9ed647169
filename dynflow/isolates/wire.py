"""Messages and framing between an isolate and its host. Stdlib only: both sides run this.

A frame is four bytes of length (big endian) and a JSON array whose first item is its kind:

    ["call", id, target, method, args, kwargs, scope]     ids are the caller's own, counted up from 1
    ["return", id, value]                                 answers a call of the receiver
    ["error", id, failure, step, attempts]                likewise; the last two where a step failed for good
    ["release", number]                                   the sender has no stub of this object of the receiver's any
                                                          more (0: of any)
    ["cancel", id]                                        the caller wants no answer any more; one still comes
    ["idle", seen, quiet, due]                            guest only: it waits, having read `seen` frames
    ["output", text, level, source]                       guest only: it printed, logged or warned

Values are packed by dynflow.serialization; what goes by reference is a stub (stubs.py). Whatever else arrives raises
ProtocolError: the bytes are hostile.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from dynflow.errors import InvalidArgumentError, IsolateLimitError
from dynflow.failure import Failure, RemoteError, storable
from dynflow.isolates.frames import FrameReader, OversizeError, ProtocolError, decode_frame, encode_frame
from dynflow.isolates.stubs import Stubs
from dynflow.serialization import MEBIBYTE, pack, unpack
from dynflow.workflow import PORT_GONE

_MAX_ERROR_NAME, _MAX_ERROR_TEXT = 300, 16_000
# Bytes that the arguments of unanswered calls may take here, together.
_MOST_HELD = 128 * MEBIBYTE
# Calls whose values are plain data: what they carry is stored.
_PLAIN = frozenset({"load", "run", "callback", "step"})
# Larger numbers can be made to have one hash, and then keep a dict busy.
_END_OF_IDS = 1 << 53
_MAX_LEVEL = 100  # of logging, whose highest is 50


@dataclass(frozen=True, slots=True)
class Call:
    """A call as the side that performs it gets it. `scope` is the id of the receiver's own call that it is part of."""

    id: int
    target: str
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    scope: int | None


@dataclass(frozen=True, slots=True)
class WireLimits:
    """What is accepted from the other side: bytes of one frame, calls unanswered at a time."""

    message: int = 8 * MEBIBYTE
    outstanding: int = 20_000


Perform = Callable[[Call], Awaitable[Any]]


class Peer:
    """One end of the wire: makes calls, performs those of the other side, cancels both ways.

    `perform` is called as soon as a call has been read; what it returns is awaited in a task.

    *Order of calls*: `feed` what arrives; `call` any time until `close`. *Concurrency*: one event loop; every
    incoming call runs in a task of its own. *Cancellation*: cancelling the future of a call sends a cancel;
    the other side answers in any case. *Errors*: `feed` raises ProtocolError or IsolateLimitError, and the
    owner must close; a call's future gets RemoteError, or what `close` was given.
    """

    def __init__(
        self,
        write: Callable[[bytes], None],
        perform: Perform,
        limits: WireLimits,
        *,
        on_idle: Callable[[int, bool, float | None], None] | None = None,
        on_output: Callable[[str, int, str], None] | None = None,
        incoming: int | None = None,
    ) -> None:
        self._write, self._perform, self.limits = write, perform, limits
        self._incoming = incoming
        self._on_idle, self._on_output = on_idle, on_output
        self._reader = FrameReader(incoming or limits.message)
        self._next_id = 0
        self._calls: dict[int, CallFuture] = {}
        self.performing: dict[int, asyncio.Task[None]] = {}
        self._held = 0
        self.stubs: Stubs | None = None
        """What goes by reference; None where nothing may."""
        self.stub_numbers = itertools.count(1)
        self.seen = 0
        self.sent = 0
        self.closed: BaseException | None = None

    def set_limits(self, limits: WireLimits) -> None:
        """Use other limits from now on."""
        self.limits = limits
        self._reader.limit = self._incoming or limits.message

    # --- out ---

    def call(
        self, target: str, method: str, args: Any = (), kwargs: Any = None, scope: int | None = None
    ) -> CallFuture:
        """Send a call; the future finishes with its result or RemoteError, and has the call's `id`.

        Raises UnserializableError or ValueTooLargeError where the arguments cannot be sent.
        """
        if self.closed is not None:
            raise self.closed
        self._next_id += 1
        number = self._next_id
        packing = self._packing(target)
        packed_kwargs = {key: packing(value) for key, value in kwargs.items()} if kwargs else {}
        frame = ["call", number, target, method, [packing(value) for value in args], packed_kwargs, scope]
        data = encode_frame(frame, self.limits.message)
        future = CallFuture(number, asyncio.get_running_loop(), target)
        self._calls[number] = future
        future.add_done_callback(self._call_done)
        self._send(data)
        return future

    def send(self, *frame: Any) -> None:
        """Send a frame without values: idle or output."""
        self._send(encode_frame(list(frame)))

    def unanswered(self) -> int:
        """Return how many own calls have no answer, cancelled ones included."""
        return len(self._calls)

    def close(self, reason: BaseException) -> None:
        """Cancel what is performed here; fail what was called there with `reason`."""
        if self.closed is not None:
            return
        self.closed = reason
        for task in self.performing.values():
            task.cancel(PORT_GONE)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(reason)
                future.exception()  # the caller may be gone: then nobody retrieves it
            if not future.answered.done():
                future.answered.set_result(None)
        self._calls.clear()
        if self.stubs is not None:
            self.stubs.close()

    def _call_done(self, future: asyncio.Future[Any]) -> None:
        if future.cancelled() and self.closed is None and isinstance(future, CallFuture):
            self._send(encode_frame(["cancel", future.id]))

    def _send(self, data: bytes) -> None:
        if self.closed is None:
            self.sent += 1
            self._write(data)

    def _packing(self, target: str) -> Callable[[Any], Any]:
        return pack if self.stubs is None or target in _PLAIN else self.stubs.pack

    # --- in ---

    def _unpacking(self, target: str) -> Callable[[Any], Any]:
        stubs = self.stubs
        if stubs is None or not self._reader.has_stubs or target in _PLAIN:
            return unpack
        return lambda value: unpack(stubs.lift(value))

    def feed(self, data: bytes) -> None:
        """Act on the frames in `data`. Raises ProtocolError for any other bytes, IsolateLimitError over a limit."""
        for frame in self._reader.feed(data):
            if self.closed is not None:
                return
            self.seen += 1
            handler = _HANDLERS.get(frame[0])
            if handler is None:
                raise ProtocolError(f"unknown kind of frame: {frame[0]!r:.40}")
            try:
                handler(self, *frame[1:])
            except (
                TypeError,
                ValueError,
                AttributeError,
                LookupError,
                ArithmeticError,
                RecursionError,
            ) as error:
                raise ProtocolError(f"a frame {frame[0]!r} is malformed: {error!s:.200}") from None

    def _on_call(self, number: Any, target: Any, method: Any, args: Any, kwargs: Any, scope: Any) -> None:
        types = (type(number), type(target), type(method), type(args), type(kwargs))
        if types != (int, str, str, list, dict) or type(scope) not in (int, type(None)):
            raise ValueError("wrong types")
        if not 0 < number < _END_OF_IDS:
            raise ValueError("no call has such a number")
        if number in self.performing:
            raise ValueError(f"call {number} is running already")
        if len(self.performing) >= self.limits.outstanding:
            most = self.limits.outstanding
            raise IsolateLimitError("outstanding", most, f"more than {most:,} calls wait for an answer")
        unpacking = self._unpacking(target)
        try:
            values = {key: unpacking(value) for key, value in kwargs.items()}
            given = tuple([unpacking(value) for value in args])
        except InvalidArgumentError as error:  # a stub that has ended, or never was
            self._send(_error_frame(number, error))
            return
        try:
            result = self._perform(Call(number, target, method, given, values, scope))
        except Exception as error:  # noqa: BLE001 - whatever a call raises is its answer
            result = _raise(error)
        if isinstance(result, asyncio.Future) and result.done() and not result.cancelled():
            # At once, before the next frame is looked at: an answer that is due must not pass for idleness.
            self._send(self._settled(number, result, target))
            return
        task = asyncio.get_running_loop().create_task(self._answer(number, result, target))
        weight = self._reader.weight
        self._held += weight
        self.performing[number] = task
        task.add_done_callback(functools.partial(self._performed, number, result, weight))
        if self._held > _MOST_HELD:
            text = f"the arguments of calls that wait for an answer take more than {_MOST_HELD:,} bytes"
            raise IsolateLimitError("outstanding", self.limits.outstanding, text)

    def _settled(self, number: int, result: asyncio.Future[Any], target: str) -> bytes:
        try:
            return self._return_frame(number, result.result(), target)
        except Exception as error:  # noqa: BLE001 - likewise its answer
            return _error_frame(number, error)

    def _return_frame(self, number: int, value: Any, target: str) -> bytes:
        return encode_frame(["return", number, self._packing(target)(value)], self.limits.message)

    async def _answer(self, number: int, result: Awaitable[Any], target: str) -> None:
        try:
            data = self._return_frame(number, await result, target)
        except Exception as error:  # noqa: BLE001 - likewise its answer
            data = _error_frame(number, error)
        self._send(data)

    def _performed(self, number: int, result: Awaitable[Any], weight: int, task: asyncio.Task[None]) -> None:
        self._held -= weight
        self.performing.pop(number, None)
        if not task.cancelled():
            return
        # It may have been cancelled before it began to await.
        if isinstance(result, asyncio.Future):
            result.cancel(None if self.closed is None else PORT_GONE)
        elif inspect.iscoroutine(result):
            result.close()
        self._send(
            _error_frame(number, Failure("CancelledError", "cancelled", "asyncio.exceptions:CancelledError"))
        )

    def _on_return(self, number: Any, value: Any) -> None:
        try:
            result = self._unpacking(self._calls[number].target)(value)
        except InvalidArgumentError as error:  # a stub that has ended, or never was
            result = error
        future = self._answered(number)
        if future.done():
            return
        if isinstance(result, InvalidArgumentError):
            future.set_exception(result)
        else:
            future.set_result(result)

    def _on_error(self, number: Any, packed: Any, step: Any, attempts: Any) -> None:
        failure = unpack(packed)
        if not _is_failure(failure) or not isinstance(step, (str, type(None))):
            raise ValueError("not a failure")
        future = self._answered(number)
        if not future.done():
            # A step's own name and number are much smaller; nobody else may make them large.
            told = attempts if type(attempts) is int and 0 < attempts < _END_OF_IDS else None
            name = None if step is None else storable(step[:_MAX_ERROR_NAME])
            future.set_exception(RemoteError(_bounded(failure), name, told))

    def _answered(self, number: Any) -> CallFuture:
        future = self._calls.pop(number)
        if not future.answered.done():
            future.answered.set_result(None)
        return future

    def _on_cancel(self, number: Any) -> None:
        task = self.performing.get(number)
        if task is not None:  # else it was answered while the cancel was on its way
            task.cancel()

    def _on_release(self, number: Any) -> None:
        if self.stubs is not None:
            self.stubs.release(number)

    def _on_idle_frame(self, seen: Any, quiet: Any, due: Any) -> None:
        if type(seen) is not int or type(quiet) is not bool or type(due) not in (int, float, type(None)):
            raise ValueError("wrong types")
        if self._on_idle is None:
            raise ValueError("only guests are idle")
        self._on_idle(seen, quiet, due)

    def _on_output_frame(self, text: Any, level: Any = 20, source: Any = "stdout") -> None:
        if (type(text), type(level), type(source)) != (str, int, str) or self._on_output is None:
            raise ValueError("only guests print text")
        self._on_output(text, min(max(level, 0), _MAX_LEVEL), source[:_MAX_ERROR_NAME])


class CallFuture(asyncio.Future[Any]):
    """The answer to come of a call; `id` is the call's, `answered` is done once the other side has finished.

    The two differ for a call that was cancelled: its other side may still be at it.
    """

    def __init__(self, number: int, loop: asyncio.AbstractEventLoop, target: str) -> None:
        super().__init__(loop=loop)
        self.id, self.target = number, target
        self.answered: asyncio.Future[None] = loop.create_future()


_HANDLERS: dict[str, Callable[..., None]] = {
    "call": Peer._on_call,  # noqa: SLF001 - the table is part of the class
    "return": Peer._on_return,  # noqa: SLF001
    "error": Peer._on_error,  # noqa: SLF001
    "cancel": Peer._on_cancel,  # noqa: SLF001
    "release": Peer._on_release,  # noqa: SLF001
    "idle": Peer._on_idle_frame,  # noqa: SLF001
    "output": Peer._on_output_frame,  # noqa: SLF001
}


async def _raise(error: Exception) -> Any:
    raise error


def _error_frame(number: int, error: Failure | Exception) -> bytes:
    failure = error if isinstance(error, Failure) else getattr(error, "failure", None)
    if not isinstance(failure, Failure):
        failure = Failure.of(error)  # type: ignore[arg-type]  # a Failure has been dealt with
    step, attempts = getattr(error, "step", None), getattr(error, "attempts", None)
    step = step if isinstance(step, str) else None
    return encode_frame(["error", number, pack(failure), step, attempts if type(attempts) is int else None])


def _bounded(failure: Failure) -> Failure:
    """Return `failure` as `Failure.of` would make it: a hostile one may fill its whole message, with anything."""
    args = failure.args
    if args is not None and len(encode_frame([pack(args)])) > _MAX_ERROR_TEXT:
        args = None
    return Failure(
        storable(failure.name[:_MAX_ERROR_NAME]),
        storable(failure.message[:_MAX_ERROR_TEXT]),
        storable(failure.type[:_MAX_ERROR_NAME]),
        args,
        storable(failure.traceback[-_MAX_ERROR_TEXT:]),
        failure.retry,
    )


def _is_failure(value: Any) -> bool:
    # The dataclass checks no types; these are all that is read of it.
    return (
        type(value) is Failure
        and all(type(text) is str for text in (value.name, value.message, value.type, value.traceback))
        and type(value.args) in (tuple, type(None))
        and value.retry in ("yes", "no", "when_configured")
    )


__all__ = [
    "Call",
    "CallFuture",
    "FrameReader",
    "OversizeError",
    "Peer",
    "ProtocolError",
    "WireLimits",
    "decode_frame",
    "encode_frame",
]

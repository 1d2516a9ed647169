"""The host's side of one isolate: start, speak, limit, kill."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Protocol

from dynflow.errors import DynflowError, InvalidArgumentError, IsolateCrashedError, IsolateLimitError
from dynflow.isolates import Caller, IsolateLimits
from dynflow.isolates.tails import Tails, size_of
from dynflow.isolates.watchdog import Watchdog
from dynflow.isolates.wire import Call, CallFuture, OversizeError, Peer, ProtocolError, WireLimits
from dynflow.isolates.zygotes import IsolateProcess
from dynflow.serialization import MEBIBYTE

# Frames a second from one isolate before its host reads it more slowly: parsing them costs the host 10 µs each.
_FRAMES_PER_SECOND = 20_000
# Seconds of its host's time that one isolate gets in each, for reading what it sends.
_SHARE = 0.25
# Bytes of answers that wait until the isolate reads them: what it asks for it has to take.
_UNREAD = 128 * MEBIBYTE
# How long cancelled code may take to finish, before its isolate is stopped (dynflow.isolates.EntrypointStub).
CANCEL_GRACE = 1.0
ENDED = "the step attempt or call that this comes from has ended"

_numbers = itertools.count(1)

OnOutput = Callable[[Caller, str], None]


class Guest(Protocol):
    """What an isolate's messages go to: the session that holds it."""

    caller: Caller

    def perform(self, call: Call) -> Any:
        """Perform a call of the guest."""

    def sent(self) -> None:
        """Note that the guest was sent something."""

    def idled(self) -> None:
        """Note that the guest waits, having read everything."""


class Isolate(asyncio.Protocol):
    """One isolate's process and the wire to it. It serves one session at a time."""

    def __init__(self, process: IsolateProcess, on_output: OnOutput) -> None:
        self._process, self._on_output = process, on_output
        self._loop = asyncio.get_running_loop()
        self.limits = IsolateLimits()
        self.watchdog = Watchdog(process.cpu_clock, self.fail)
        self._transport: asyncio.Transport | None = None
        self.peer = Peer(self._write, self._perform, WireLimits(), on_idle=self._idle, on_output=self._output)
        self.session: Guest | None = None
        self.started_at = self._loop.time()
        self.failed: DynflowError | None = None
        self._outputs = 0
        self._tails: Tails | None = None
        self.id = f"{os.getpid()}-{next(_numbers)}"
        self._second = (self._loop.time(), 0, 0.0)

    @staticmethod
    async def start(process: IsolateProcess, on_output: OnOutput) -> Isolate:
        """Return the isolate of `process`."""
        isolate = Isolate(process, on_output)
        try:
            await isolate._loop.create_connection(lambda: isolate, sock=process.take_socket())
        except BaseException:
            process.kill()
            raise
        process.cpu_clock()  # which it finds out once
        return isolate

    def load(
        self,
        main_module: str,
        modules: Mapping[str, Any],
        env: Mapping[str, Any],
        metadata: Any,
        limits: IsolateLimits,
        tails: Tails,
    ) -> CallFuture:
        """Send the worker's code; everything called later runs in it."""
        self.started_at = self._loop.time()
        self._tails = tails
        self.limits = limits
        self.watchdog.load(limits)
        self.peer.set_limits(WireLimits(limits.message, limits.outstanding))
        return self.peer.call(
            "load", "", [main_module, dict(modules), dict(env), metadata, limits.memory, limits.message]
        )

    def resident(self) -> int:
        """Return the bytes of memory that it holds, without what it shares with files; 0 where it has ended."""
        return self._process.resident()

    @property
    def is_usable(self) -> bool:
        """Whether nothing has gone wrong and nothing is under way."""
        return self.failed is None and not self.peer.unanswered() and not self.peer.performing

    @property
    def is_alive(self) -> bool:
        """Whether its process runs: one that died a moment ago may seem usable."""
        return self._process.is_alive()

    def begin(self, session: Guest, limits: IsolateLimits) -> None:
        """Give it to `session`, whose call has these limits."""
        self.session = session
        self.watchdog.begin(limits)

    def end(self) -> None:
        """Take it from its session."""
        self.session = None
        self.watchdog.end()

    def fail(self, error: DynflowError) -> None:
        """Stop the isolate; whatever waits for it gets `error`."""
        if self.failed is None:
            self.failed = error
            self.peer.close(error)
            self.kill()

    def kill(self) -> None:
        """Stop it at once."""
        if self.failed is None:
            self.failed = IsolateCrashedError("the isolate was stopped")
            self.peer.close(self.failed)
        self._process.kill()
        self.watchdog.close()
        if self._transport is not None:
            self._transport.abort()

    async def stop(self) -> None:
        """Stop it; returns when its process is gone."""
        self.kill()
        await self._process.gone.wait()

    def expect_obedience(self, cancelled: CallFuture) -> None:
        """Stop the isolate if it is still at a cancelled call after the grace."""

        def look() -> None:
            if not cancelled.answered.done():
                text = "the isolate was stopped: cancelled code went on for more than a second"
                self.fail(IsolateLimitError("cancel", timedelta(seconds=CANCEL_GRACE), text))

        self._loop.call_later(CANCEL_GRACE, look)

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Act on what the guest sent."""
        heard = self.peer.seen - self._outputs
        started = self._loop.time()
        try:
            self.peer.feed(data)
        except OversizeError as error:
            self.fail(IsolateLimitError("message", self.limits.message, f"the isolate was stopped: {error}"))
        except ProtocolError as error:
            self.fail(IsolateCrashedError(f"the isolate sent what it never may and was stopped: {error}"))
        except IsolateLimitError as error:
            self.fail(error)
        else:
            if not self.watchdog.waits and self.peer.seen - self._outputs > heard:
                self.watchdog.heard()
            self._slow_down(started)

    def eof_received(self) -> bool:
        """Find out why the guest has gone."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Find out why the guest has gone."""
        del exc
        if self.failed is None:
            self._loop.create_task(self._explain_end()).add_done_callback(_retrieve)

    async def _explain_end(self) -> None:
        try:
            async with asyncio.timeout(1):
                await self._process.gone.wait()
                status = await asyncio.shield(self._process.status)
        except TimeoutError:
            status = None
        if status == -signal.SIGKILL:
            text = "the isolate's process was killed, most likely for the memory it used"
            self.fail(IsolateLimitError("memory", self.limits.memory, text))
        elif status == -signal.SIGXCPU:
            most = self.limits.isolate_cpu_ms
            self.fail(IsolateLimitError("isolate_cpu_ms", most, "the isolate used up its CPU time"))
        else:
            how = "ended" if status is None else f"exited with {status}"
            if status is not None and status < 0:
                how = f"was ended by {signal.Signals(-status).name}"
            self.fail(IsolateCrashedError(f"the isolate's process {how}"))

    # --- the wire ---

    def _write(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        waiting = self._transport.get_write_buffer_size()
        if waiting > _UNREAD:
            # Not here: whoever sends goes on to use the peer. Nothing more is kept until then.
            self._loop.call_soon(self.fail, _unread_error(waiting))
            return
        self.watchdog.sent()
        self._transport.write(data)
        if self.session is not None:
            self.session.sent()

    def _perform(self, call: Call) -> Any:
        if self.session is None:
            raise InvalidArgumentError(ENDED)
        return self.session.perform(call)

    def _idle(self, seen: int, quiet: bool, due: float | None) -> None:  # noqa: FBT001 - as the frame has it
        if seen > self.peer.sent:
            raise ValueError("it cannot have read more than was sent")
        if seen < self.peer.sent:
            return  # more is on its way to it: it will be busy again
        self.watchdog.waiting(None if quiet else due or 0.0)
        if quiet and self.session is not None:
            self.session.idled()

    def _output(self, text: str, level: int, source: str) -> None:
        self._outputs += 1
        self.watchdog.printed(size_of(text) + size_of(source))
        self._on_output(self.session.caller if self.session is not None else Caller(""), text)
        self.tell(level, source, text)

    def tell(self, level: int, source: str, text: str) -> None:
        """Tell the tails of its worker."""
        if self._tails is not None and self.session is not None:
            self._tails.tell(self.session.caller.worker_id, self.id, level, source, text)

    def _slow_down(self, started: float) -> None:
        """Read no more for a while where this isolate has sent too much, or taken too much of the host's time."""
        now = self._loop.time()
        since, frames, spent = self._second
        if now - since >= 1:
            since, frames, spent = started, self.peer.seen - 1, 0.0
        spent += now - started
        self._second = (since, frames, spent)
        if self._transport is None or (spent < _SHARE and self.peer.seen - frames <= _FRAMES_PER_SECOND):
            return
        self._transport.pause_reading()
        self._loop.call_later(max(1 - (now - since), (now - started) / _SHARE), self._resume_reading)

    def _resume_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


def _unread_error(size: int) -> IsolateLimitError:
    text = f"the isolate was stopped: it does not read what it asked for, of which {size:,} bytes wait"
    return IsolateLimitError("unread", _UNREAD, text)


def _retrieve(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()

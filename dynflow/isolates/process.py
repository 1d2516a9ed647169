"""The host's side of one isolate: start, speak, limit, kill."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from dynflow.errors import (
    DynflowError,
    InstanceFailedError,
    InvalidArgumentError,
    IsolateCrashedError,
    IsolateLimitError,
    WorkerLoadError,
)
from dynflow.failure import Failure, RemoteError
from dynflow.isolates import Activity, Caller, IsolateLimits, SegmentPort
from dynflow.isolates.bindings import HostBinding
from dynflow.isolates.pool import IsolateProcess
from dynflow.isolates.wire import Call, CallFuture, OversizeError, Peer, ProtocolError, WireLimits
from dynflow.types import RollbackContext, StepContext
from dynflow.workflow import StepCall

# Frames a second from one isolate before its host reads it more slowly: parsing them costs the host 10 µs each.
_FRAMES_PER_SECOND = 20_000
# How long cancelled code may take to finish, before its isolate is stopped (dynflow.isolates.EntrypointStub).
CANCEL_GRACE = 1.0
ENDED = "the step attempt or call that this comes from has ended"

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
        self._limits = IsolateLimits()
        self._transport: asyncio.Transport | None = None
        self.peer = Peer(
            self._write, self._perform, WireLimits(), on_idle=self._idle, on_output=self._output
        )
        self.session: Guest | None = None
        self.failed: DynflowError | None = None
        self._printed = self._outputs = 0
        self._waits = True
        self._deadline: float | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._frames_since = (self._loop.time(), 0)

    @staticmethod
    async def start(process: IsolateProcess, on_output: OnOutput) -> Isolate:
        """Return the isolate of `process`."""
        isolate = Isolate(process, on_output)
        await isolate._loop.create_connection(lambda: isolate, sock=process.socket)  # noqa: SLF001 - own class
        return isolate

    def load(self, main_module: str, modules: Mapping[str, str], env: Mapping[str, Any], metadata: Any, limits: IsolateLimits) -> CallFuture:
        """Send the worker's code; everything called later runs in it."""
        self._limits = limits
        self.peer.set_limits(WireLimits(limits.message, limits.outstanding))
        return self.peer.call(
            "load", "", [main_module, dict(modules), dict(env), metadata, limits.memory, limits.message]
        )

    @property
    def is_usable(self) -> bool:
        """Whether nothing has gone wrong and nothing is under way."""
        return self.failed is None and not self.peer.unanswered() and not self.peer.performing

    def renew(self) -> None:
        """Begin another session's account."""
        self._printed = 0

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
        if self._watch is not None:
            self._watch.cancel()
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
                self.fail(IsolateLimitError("the isolate was stopped: cancelled code went on for more than a second"))

        self._loop.call_later(CANCEL_GRACE, look)

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Act on what the guest sent."""
        heard = self.peer.seen - self._outputs
        try:
            self.peer.feed(data)
        except OversizeError as error:
            self.fail(IsolateLimitError(f"the isolate was stopped: {error}"))
        except ProtocolError as error:
            self.fail(IsolateCrashedError(f"the isolate sent what it never may and was stopped: {error}"))
        except IsolateLimitError as error:
            self.fail(error)
        else:
            if not self._waits and self.peer.seen - self._outputs > heard:
                self._expect_within(self._busy)
            self._slow_down()

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
            self.fail(IsolateLimitError("the isolate's process was killed, most likely for the memory it used"))
        elif status == -signal.SIGXCPU:
            self.fail(IsolateLimitError("the isolate used up its CPU time"))
        else:
            how = "ended" if status is None else f"exited with {status}"
            if status is not None and status < 0:
                how = f"was ended by {signal.Signals(-status).name}"
            self.fail(IsolateCrashedError(f"the isolate's process {how}"))

    # --- limits ---

    def _write(self, data: bytes) -> None:
        if self._transport is None:
            return
        if self._waits:
            self._waits = False
            self._expect_within(self._busy)
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
        self._waits = True
        # Where a timer runs it wakes up by itself, and says so when it waits again.
        self._deadline = None if quiet else self._loop.time() + max(0.0, due or 0.0) + self._busy
        if not quiet:
            self._arm()
        elif self.session is not None:
            self.session.idled()

    @property
    def _busy(self) -> float:
        return self._limits.busy.total_seconds()

    def _expect_within(self, seconds: float) -> None:
        self._deadline = self._loop.time() + seconds
        self._arm()

    def _arm(self) -> None:
        # A timer that is due earlier is left alone: it looks again. So a busy wire does not churn timers.
        if self._deadline is None or (self._watch is not None and self._watch.when() <= self._deadline):
            return
        if self._watch is not None:
            self._watch.cancel()
        self._watch = self._loop.call_at(self._deadline, self._look)

    def _look(self) -> None:
        self._watch = None
        if self.failed is not None or self._deadline is None:
            return
        if self._loop.time() < self._deadline:
            self._arm()
            return
        self.fail(
            IsolateLimitError(
                f"the isolate was stopped: its code ran for {self._busy:g} seconds without coming back to its event loop"
            )
        )

    def _output(self, text: str) -> None:
        self._printed += len(text)
        self._outputs += 1
        if self._printed > self._limits.output:
            raise IsolateLimitError(f"the isolate was stopped: it printed more than {self._limits.output:,} bytes")
        caller = self.session.caller if self.session is not None else Caller("")
        self._on_output(caller, text)

    def _slow_down(self) -> None:
        since, count = self._frames_since
        now = self._loop.time()
        if now - since >= 1:
            self._frames_since = (now, self.peer.seen)
        elif self.peer.seen - count > _FRAMES_PER_SECOND and self._transport is not None:
            self._transport.pause_reading()
            self._loop.call_later(1 - (now - since), self._resume_reading)

    def _resume_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


class Session:
    """One call of an entrypoint, from its start to its end; it alone holds its isolate."""

    def __init__(
        self,
        isolate: Isolate,
        bindings: Mapping[str, HostBinding],
        caller: Caller,
        port: SegmentPort | None = None,
        activity: Activity | None = None,
    ) -> None:
        self._isolate, self._bindings, self.caller = isolate, bindings, caller
        self._port, self._activity = port, activity
        self._entry: CallFuture | None = None
        self._scopes: dict[int, _Scope] = {}
        self.has_rollbacks = False
        isolate.session = self

    async def call(self, target: str, method: str, args: list[Any]) -> Any:
        """Call the guest and return its result; raises RemoteError, or an isolate error."""
        entry = self._isolate.peer.call(target, method, args)
        self._entry = entry
        self._scopes[entry.id] = _Scope(self.caller)
        try:
            return await entry
        except RemoteError as error:
            raise self._stopped_by(error.failure) or error from None
        finally:
            await self._close_scope(entry.id)

    async def cancelled(self) -> None:
        """Give the code that was cancelled a moment to finish."""
        if self._entry is not None:
            await asyncio.wait([self._entry.answered], timeout=CANCEL_GRACE)

    def close(self) -> None:
        """Take no more calls."""
        self._isolate.session = None

    # --- what the isolate tells ---

    def sent(self) -> None:
        """Note that the guest was sent something: it will run."""
        if self._activity is not None:
            self._activity.active()

    def idled(self) -> None:
        """Note that the guest waits. It can do nothing until a step call is answered, unless it asked for else."""
        entry = self._entry
        if self._activity is None or entry is None or entry.done():
            return
        if not self._running(self._scopes[entry.id]):
            self._activity.idle()

    def perform(self, call: Call) -> Any:
        """Perform a call of the guest. What it asks for is checked here; it can ask for anything."""
        if call.target == "step":
            return self._step(call)
        scope = self._scopes.get(call.scope) if call.scope is not None else None
        kind, _, name = call.target.partition(":")
        if scope is None:
            raise InvalidArgumentError(ENDED)
        if kind != "env" or name not in self._bindings:
            raise InvalidArgumentError(f"there is no binding {call.target!r:.100}")
        scope.calls.add(call.id)
        return self._bindings[name].call(scope.caller, call.method, call.args, call.kwargs)

    def _step(self, call: Call) -> Any:
        if self._port is None:
            raise InvalidArgumentError("there are no steps outside of a workflow's run")
        kind, name, count, config, rollback_config, argument, event_type, kept = call.args
        if kind not in {"do", "sleep", "sleep_until", "wait_for_event"} or type(count) is not int or count < 1:
            raise InvalidArgumentError("not a step call")
        self.has_rollbacks = self.has_rollbacks or "rollback" in kept
        callbacks = {key: self._function(key, kept[key]) for key in kept if type(kept[key]) is int}
        config = _with_delay(config, callbacks.get("delay"))
        rollback_config = _with_delay(rollback_config, callbacks.get("rollback_delay"))
        return self._port.call(
            StepCall(
                kind,
                name,
                count,
                config,
                callbacks.get("callback"),
                callbacks.get("rollback"),
                rollback_config,
                argument,
                event_type,
            )
        )

    def _function(self, what: str, number: int) -> Any:
        if number == 0:
            return "not a function"
        if what in {"delay", "rollback_delay"}:
            return lambda ctx, error: self._callback("delay", number, ctx, error)
        return lambda ctx: self._callback(what, number, ctx)

    async def _callback(self, what: str, number: int, argument: Any, error: BaseException | None = None) -> Any:
        """Call a function of the guest for the segment; a cancelled one has a second to obey."""
        ctx = argument.ctx if isinstance(argument, RollbackContext) else argument
        args = [number, argument]
        if error is not None:
            failure = error.failure if isinstance(error, RemoteError) else Failure.of(error)
            args += [failure, ctx.step.name, ctx.attempt]
        future = self._isolate.peer.call("callback", what, args)
        step = ctx if isinstance(ctx, StepContext) else None
        self._scopes[future.id] = _Scope(replace(self.caller, step=step))
        try:
            return await future
        except RemoteError as remote:
            raise self._stopped_by(remote.failure) or remote from None
        except asyncio.CancelledError:
            self._isolate.expect_obedience(future)
            raise
        finally:
            await self._close_scope(future.id)

    def _running(self, scope: _Scope) -> list[asyncio.Task[None]]:
        performing = self._isolate.peer.performing
        scope.calls = {number for number in scope.calls if number in performing}
        return [performing[number] for number in scope.calls]

    async def _close_scope(self, number: int) -> None:
        left = self._running(self._scopes.pop(number))
        for task in left:
            task.cancel()
        if left:  # what they were doing (a sandbox) shall have ended when the attempt has
            await asyncio.wait(left)

    def _stopped_by(self, failure: Failure) -> DynflowError | None:
        if failure.type == "builtins:MemoryError":
            self._isolate.fail(IsolateLimitError("the isolate was stopped: its code needs more memory than its limit"))
            return self._isolate.failed
        return None


class _Scope:
    """A live call into the guest, and the capability calls that it makes."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.calls: set[int] = set()


def _with_delay(config: Any, delay: Any) -> Any:
    if delay is None or not isinstance(config, dict) or not isinstance(config.get("retries"), dict):
        return config
    return {**config, "retries": {**config["retries"], "delay": delay}}


# Classes that tenants may have raised in their isolate as themselves. Any other class that the host has loaded
# stays a name: a tenant shall not make the host raise its own control-flow errors.
_TENANTS_ERRORS = frozenset(
    "NonRetryableError WorkflowTimeoutError WorkflowInternalError WorkflowFatalError NonRetryableDelayError "
    "StepFailedError InstanceFailedError InstanceTerminatedError InvalidInstanceIdError InstanceNotFoundError "
    "InstanceExistsError IllegalMoveError InvalidArgumentError UnserializableError ValueTooLargeError".split()
)


def error_of(failure: Failure) -> BaseException:
    """Return what a stub's call raises where the tenant's code failed with `failure`."""
    module, _, name = failure.type.partition(":")
    known = module == "builtins" or module.partition(".")[0] == "pipelines"
    if known or (module == "dynflow.errors" and name in _TENANTS_ERRORS):
        error = failure.rebuild(only_loaded=True)
        if error is not None:
            return error
    return load_error_of(failure) or InstanceFailedError(failure.name, failure.message)


def load_error_of(failure: Failure) -> WorkerLoadError | None:
    """Return the WorkerLoadError that `failure` is, else None."""
    if failure.type != "dynflow.errors:WorkerLoadError":
        return None
    error = failure.rebuild(only_loaded=True)
    return error if isinstance(error, WorkerLoadError) else WorkerLoadError(failure.message)


def _retrieve(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()

"""One call of an entrypoint on the host's side: what the guest may ask while it lasts, and who it is then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dynflow.errors import (
    DynflowError,
    InstanceFailedError,
    InvalidArgumentError,
    IsolateLimitError,
    WorkerLoadError,
)
from dynflow.failure import Failure, RemoteError
from dynflow.isolates import Activity, Caller, IsolateLimits, SegmentPort, current_caller
from dynflow.isolates.bindings import OUTBOUND, HostBinding
from dynflow.isolates.host_stubs import host_stubs
from dynflow.isolates.process import CANCEL_GRACE, ENDED, Isolate
from dynflow.isolates.wire import Call, CallFuture
from dynflow.loop import outside
from dynflow.types import RollbackContext, StepContext
from dynflow.workflow import StepCall, current_attempt

# The guest counts the steps of a name; no instance can have as many, and databases hold no larger number.
_MOST_OF_ONE_NAME = 1 << 31
# Stubs that one session gives away, and holds, at a time.
_MOST_STUBS = 1_000


class Session:
    """One call of an entrypoint, from its start to its end; it alone holds its isolate."""

    def __init__(
        self,
        isolate: Isolate,
        bindings: Mapping[str, HostBinding],
        caller: Caller,
        limits: IsolateLimits,
        port: SegmentPort | None = None,
        activity: Activity | None = None,
    ) -> None:
        self._isolate, self._bindings, self.caller = isolate, bindings, caller
        self._port, self._activity = port, activity
        self._entry: CallFuture | None = None
        self._scopes: dict[int, _Scope] = {}
        self.has_rollbacks = False
        self.let_go = asyncio.Event()
        """Set once the host holds no stub of the isolate's."""
        peer = isolate.peer
        most = min(limits.outstanding, _MOST_STUBS)
        self._stubs = host_stubs(
            peer.stub_numbers, most, bindings, self._call_stub, self._send_release, self.let_go.set
        )
        peer.stubs = self._stubs
        isolate.begin(self, limits)

    async def call(self, target: str, method: str, args: list[Any]) -> Any:
        """Call the guest and return its result; raises RemoteError, or an isolate error."""
        entry = self._isolate.peer.call(target, method, args)
        self._entry = entry
        self._scopes[entry.id] = _Scope(self.caller)
        try:
            result = await entry
        except RemoteError as error:
            self._isolate.tell(logging.ERROR, "uncaught", error.failure.traceback or str(error.failure))
            raise self._stopped_by(error.failure) or error from None
        else:
            self._entry = None  # it refers to the result, which may be what keeps this session alive
            return result
        finally:
            await self._close_scope(entry.id)

    async def cancelled(self) -> None:
        """Give the code that was cancelled a moment to finish."""
        if self._entry is not None:
            await asyncio.wait([self._entry.answered], timeout=CANCEL_GRACE)

    @property
    def is_held(self) -> bool:
        """Whether the host holds stubs of the isolate's: then it goes on after its call has returned."""
        return self._stubs.holds and self._isolate.failed is None

    def close(self) -> None:
        """Take no more calls."""
        if self._stubs.has_held and self._isolate.failed is None:
            self._send_release(
                0
            )  # what the call has given away does not stay in an isolate that is used again
        self._stubs.close()
        self._isolate.peer.stubs = None
        self._isolate.end()

    # --- what the isolate tells ---

    def sent(self) -> None:
        """Note that the guest was sent something: it will run."""
        if self._activity is not None:
            self._activity.active()

    def idled(self) -> None:
        """Note that the guest waits. It can do nothing until a step call is answered, unless it asked for else."""
        entry = self._entry
        if entry is None or entry.done() or self._running(self._scopes[entry.id]):
            return
        if self._activity is not None:
            self._activity.idle()
        elif not self._isolate.peer.performing and not self._stubs.holds:
            self._isolate.fail(
                IsolateLimitError(
                    "wait", None, "the isolate was stopped: its code waits for what can never happen"
                )
            )

    def perform(self, call: Call) -> Any:
        """Perform a call of the guest. What it asks for is checked here; it can ask for anything."""
        if call.target == "step":
            return self._step(call)
        scope = self._scopes.get(call.scope) if call.scope is not None else None
        kind, _, name = call.target.partition(":")
        if scope is None:
            raise InvalidArgumentError(ENDED)
        binding: HostBinding | None = None
        args = call.args
        if kind == "env":
            binding = self._bindings.get(name)
        elif call.target == "outbound":
            binding = self._bindings.get(OUTBOUND)
        elif call.target == "stub" and args:
            binding, args = self._stubs.given(args[0]).kept, args[1:]
        if binding is None:
            raise InvalidArgumentError(f"there is no binding {call.target!r:.100}")
        scope.calls.add(call.id)
        self._isolate.watchdog.asked()
        return binding.call(scope.caller, call.method, args, call.kwargs)

    def _step(self, call: Call) -> Any:
        if self._port is None:
            raise InvalidArgumentError("there are no steps outside of a workflow's run")
        kind, name, count, config, rollback_config, argument, event_type, kept = call.args
        if (
            kind not in {"do", "sleep", "sleep_until", "wait_for_event"}
            or type(count) is not int
            or not 1 <= count <= _MOST_OF_ONE_NAME
        ):
            raise InvalidArgumentError("not a step call")
        self.has_rollbacks = self.has_rollbacks or "rollback" in kept
        callbacks = {key: self._function(key, kept[key]) for key in kept if type(kept[key]) is int}
        config = _with_delay(config, callbacks.get("delay"))
        rollback_config = _with_delay(rollback_config, callbacks.get("rollback_delay"))
        step = StepCall(
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
        scope = self._scopes.get(call.scope) if call.scope is not None else None
        # Whose inner step it is.
        within = current_attempt.set(None if scope is None else scope.attempt)
        try:
            return self._port.call(step)
        finally:
            current_attempt.reset(within)

    def _function(self, what: str, number: int) -> Any:
        if number == 0:
            return "not a function"
        if what in {"delay", "rollback_delay"}:
            return lambda ctx, error: self._callback("delay", number, ctx, error)
        return lambda ctx: self._callback(what, number, ctx)

    async def _callback(
        self, what: str, number: int, argument: Any, error: BaseException | None = None
    ) -> Any:
        """Call a function of the guest for the segment; a cancelled one has a second to obey."""
        ctx = argument.ctx if isinstance(argument, RollbackContext) else argument
        args = [number, argument]
        if error is not None:
            failure = error.failure if isinstance(error, RemoteError) else Failure.of(error)
            args += [failure, ctx.step.name, ctx.attempt]
        step = ctx if isinstance(ctx, StepContext) else None
        return await self._ask("callback", what, args, {}, replace(self.caller, step=step))

    async def _call_stub(
        self, number: int, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Call what the guest keeps, as whoever made the call in which the host does so."""
        caller = current_caller.get(self.caller)
        if not any(scope.caller is caller for scope in self._scopes.values()):
            caller = self.caller
        try:
            return await outside(self._ask("stub", method, [number, *args], kwargs, caller))
        except RemoteError as error:
            raise error_of(error.failure) from error

    async def _ask(
        self, target: str, method: str, args: Sequence[Any], kwargs: Mapping[str, Any], caller: Caller
    ) -> Any:
        """Call into the guest; a call that is cancelled has a second to obey."""
        future = self._isolate.peer.call(target, method, args, kwargs)
        self._scopes[future.id] = _Scope(caller)
        try:
            return await future
        except RemoteError as remote:
            raise self._stopped_by(remote.failure) or remote from None
        except asyncio.CancelledError:
            self._isolate.expect_obedience(future)
            raise
        finally:
            await self._close_scope(future.id)

    def _send_release(self, number: int) -> None:
        self._isolate.peer.send("release", number)

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
            most = self._isolate.limits.memory
            text = "the isolate was stopped: its code needs more memory than its limit"
            self._isolate.fail(IsolateLimitError("memory", most, text))
            return self._isolate.failed
        return None


class _Scope:
    """A live call into the guest, and the capability calls that it makes."""

    def __init__(self, caller: Caller) -> None:
        self.caller, self.attempt = caller, current_attempt.get()
        self.calls: set[int] = set()


def _with_delay(config: Any, delay: Any) -> Any:
    if delay is None or not isinstance(config, dict) or not isinstance(config.get("retries"), dict):
        return config
    return {**config, "retries": {**config["retries"], "delay": delay}}


# Classes that tenants may have raised in their isolate as themselves. Any other class that the host has loaded
# stays a name: a tenant shall not make the host raise its own control-flow errors.
_TENANTS_ERRORS = frozenset(
    {
        "IllegalMoveError",
        "InstanceExistsError",
        "InstanceFailedError",
        "InstanceNotFoundError",
        "InstanceTerminatedError",
        "InvalidArgumentError",
        "InvalidInstanceIdError",
        "NonRetryableDelayError",
        "NonRetryableError",
        "OutboundRefusedError",
        "StepFailedError",
        "UnserializableError",
        "ValueTooLargeError",
        "WorkflowFatalError",
        "WorkflowInternalError",
        "WorkflowTimeoutError",
    }
)


def error_of(failure: Failure) -> BaseException:
    """Return what a stub's call raises where the tenant's code failed with `failure`."""
    module, _, name = failure.type.partition(":")
    known = module == "builtins" or module.partition(".")[0] == "pipelines"
    if known or (module == "dynflow.errors" and name in _TENANTS_ERRORS):
        error = failure.rebuild(only_loaded=True)
        if error is not None:
            return _with_traceback(error, failure)
    error = load_error_of(failure) or InstanceFailedError(failure.name, failure.message)
    return _with_traceback(error, failure)


def _with_traceback(error: BaseException, failure: Failure) -> BaseException:
    if failure.traceback:
        # It is shown on terminals and in logs, and it is the tenant's.
        shown = "".join(
            char if char.isprintable() or char == "\n" else "\ufffd" for char in failure.traceback
        )
        error.add_note(f"in the isolate:\n{shown}")
    return error


def load_error_of(failure: Failure) -> WorkerLoadError | None:
    """Return the WorkerLoadError that `failure` is, else None."""
    if failure.type != "dynflow.errors:WorkerLoadError":
        return None
    error = failure.rebuild(only_loaded=True)
    return error if isinstance(error, WorkerLoadError) else WorkerLoadError(failure.message)

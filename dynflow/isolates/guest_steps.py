"""Steps inside of an isolate: a step call is a call to the host, its functions become numbers. Stdlib only."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from dynflow.errors import StepFailedError, UnserializableError, WorkflowFatalError
from dynflow.failure import Failure, RemoteError
from dynflow.isolates.wire import Call, Peer
from dynflow.serialization import pack
from dynflow.types import RollbackContext
from dynflow.workflow import Attempt, Callback, StepCall, current_attempt, invoke

current_scope: ContextVar[int | None] = ContextVar("current_scope", default=None)
"""The id of the host's call that this code is part of: its own calls of the host name it."""


class Callbacks:
    """Functions of the tenant that the host can call, by number."""

    def __init__(self) -> None:
        self._functions: dict[int, Callback] = {}
        self._last = 0

    def keep(self, callback: Any) -> int:
        """Return a number under which the host can call `callback`; 0 where that is not possible."""
        if not callable(callback):
            return 0
        self._last += 1
        self._functions[self._last] = callback
        return self._last

    def drop(self, number: int) -> None:
        """Forget a callback."""
        self._functions.pop(number, None)

    async def call(self, call: Call) -> Any:
        """Perform the host's call of a callback."""
        number, argument, *more = call.args
        callback = self._functions[number]
        ctx = argument.ctx if isinstance(argument, RollbackContext) else argument
        current_attempt.set(Attempt(ctx))  # the host knows the path
        if call.method == "delay":
            result = callback(argument, _error_of(*more))
            return await result if hasattr(result, "__await__") else result
        return await invoke(callback, argument)


class StepWire:
    """The port of a `step` in an isolate: a step call is a call to the host, its functions become numbers."""

    is_over = False  # a workflow that is put to rest goes with its process

    def __init__(self, peer: Peer, callbacks: Callbacks) -> None:
        self._peer, self._callbacks = peer, callbacks

    async def call(self, call: StepCall) -> Any:
        """Have the host perform `call`. Where the workflow is suspended this never returns."""
        kept: dict[str, int] = {}
        if call.callback is not None:
            kept["callback"] = self._callbacks.keep(call.callback)
        if call.rollback is not None:
            kept["rollback"] = self._callbacks.keep(call.rollback)
        config = self._without_delay(call.config, "delay", kept)
        rollback_config = self._without_delay(call.rollback_config, "rollback_delay", kept)
        fields = [
            call.kind,
            call.name,
            call.count,
            config,
            rollback_config,
            call.argument,
            call.event_type,
            kept,
        ]
        try:
            for field in fields:
                pack(field)
        except UnserializableError as error:
            raise WorkflowFatalError(f"step.{call.kind}: {error}") from None
        future = self._peer.call("step", call.kind, fields, scope=current_scope.get())
        try:
            return await future
        except RemoteError as error:
            raise _step_error(error) from None
        finally:
            for what, number in kept.items():
                if not what.startswith("rollback"):  # those are called after `run` has failed
                    self._callbacks.drop(number)

    def _without_delay(self, config: Any, what: str, kept: dict[str, int]) -> Any:
        retries = config.get("retries") if isinstance(config, Mapping) else None
        if not isinstance(retries, Mapping) or not callable(retries.get("delay")):
            return config
        kept[what] = self._callbacks.keep(retries["delay"])
        return {**config, "retries": {**retries, "delay": None}}


def _step_error(error: RemoteError) -> BaseException:
    if error.step is not None and error.attempts is not None:
        return error.failure.as_step_error(error.step, error.attempts)
    return error.failure.rebuild(only_loaded=True) or error


def _error_of(failure: Failure, step: str, attempts: int) -> BaseException:
    return failure.rebuild(only_loaded=True) or StepFailedError(step, attempts, str(failure))

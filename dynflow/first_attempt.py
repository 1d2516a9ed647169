"""The first attempt of a step, without a task of its own: only what has to be awaited is given one.

Most steps end with their first attempt, and many callbacks are plain functions. Their start is stored, they are called
when that is durable, their end is stored, and they are answered when that is: all by callbacks, at a fraction of what a
task costs. Where anything has to be awaited, a task goes on, as `step.perform` would have.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

from dynflow.calling import Scope, awaited, call_now, enter, is_awaitable, leave
from dynflow.errors import LeaseLostError
from dynflow.serialization import copy_of
from dynflow.step import attempt_until_final, complete, judge, open_attempt, prepared, stored
from dynflow.step_host import StepFuture, StepHost, final_result
from dynflow.types import StepContext
from dynflow.workflow import StepCall


class FirstAttemptHost(StepHost, Protocol):
    """What a first attempt needs of its segment."""

    def is_wanted(self, future: StepFuture) -> bool:
        """Whether anybody still waits for the answer of a step that is being performed."""

    def answer(self, future: StepFuture, result: Any, error: BaseException | None = None) -> None:
        """Say how a step has ended, or why it cannot be performed."""

    def go_on(
        self,
        future: StepFuture,
        work: Callable[[], Coroutine[Any, Any, Any]],
        context: contextvars.Context,
    ) -> None:
        """Perform the rest of a step in a task."""


class FirstAttempt:
    """Performs a step that has not been started before, for the call that `future` answers.

    Raises WorkflowFatalError where the call is none. The callback runs in a copy of the caller's context.
    """

    __slots__ = ("_context", "_future", "_host", "_record", "_result", "_work")

    _result: Any

    def __init__(self, call: StepCall, future: StepFuture, host: FirstAttemptHost) -> None:
        self._work, self._record = prepared(call, None, host)
        self._future, self._host = future, host
        self._context = contextvars.copy_context()

    def begin(self) -> None:
        """Store that it starts, and go on when that is durable."""
        open_attempt(self._record, self._host)
        self._host.journal.begin_attempt(self._record, self._begun)

    def _begun(self, error: BaseException | None) -> None:
        if error is not None or not self._host.is_wanted(self._future):
            self._host.answer(self._future, None, error)
            return
        work, context, ctx = self._work, self._context, self._work.context(1)
        del self._context  # what hangs on it goes now, not when the end is stored
        scope = context.run(enter, ctx, self._record.path)
        try:
            begun = context.run(call_now, work.callback, ctx, ctx, work.config.timeout, self._host.clock)
            if is_awaitable(begun):
                self._host.go_on(self._future, partial(self._finish, begun, ctx, scope), context)
                return
            complete(self._record, begun, work, self._host)
            self._result = begun
        except LeaseLostError as lost:
            self._host.answer(self._future, None, lost)
        except Exception as raised:  # noqa: BLE001 - whatever the tenant's callback raises is the attempt's outcome
            self._host.go_on(self._future, partial(self._fail, raised, scope), context)
        else:
            self._host.journal.finish_step(self._record, self._ended)

    def _ended(self, error: BaseException | None) -> None:
        self._host.answer(self._future, copy_of(self._result, self._record.output), error)

    # --- what needs a task ---

    async def _finish(self, begun: Any, ctx: StepContext, scope: Scope) -> Any:
        work, record, host = self._work, self._record, self._host
        try:
            result = await awaited(begun, ctx, work.config.timeout, host.clock)
            complete(record, result, work, host)
        except LeaseLostError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the tenant's callback raises is the attempt's outcome
            return await self._fail(error, scope)
        leave(scope)
        await stored(host.journal.finish_step, record)
        return final_result(record)

    async def _fail(self, error: Exception, scope: Scope) -> Any:
        leave(scope)
        await judge(error, self._work, self._record, self._host)
        return await attempt_until_final(self._work, self._record, self._host)

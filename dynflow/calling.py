"""Call a tenant's function for a step: in the scope of the step, under its timeout.

What a function does before it returns cannot be stopped, only judged; what it returns to be awaited is cancelled when
its time is over.
"""

from __future__ import annotations

import asyncio
import inspect
import types
from collections.abc import Awaitable
from contextvars import Token
from datetime import timedelta
from typing import Any

from dynflow.clock import MICROSECOND, Clock
from dynflow.errors import WorkflowFatalError, WorkflowTimeoutError
from dynflow.types import StepContext
from dynflow.workflow import Attempt, Callback, begin, current_attempt

Scope = Token[Attempt | None]


def enter(ctx: StepContext, path: str) -> Scope:
    """Make the current context that of an attempt, until `leave`; `path`: see `Attempt`."""
    return current_attempt.set(Attempt(ctx, path))


leave = current_attempt.reset


def call_now(
    function: Callback, argument: Any, ctx: StepContext, limit: timedelta, clock: Clock, what: str = ""
) -> Any:
    """Call the function; return its result, or what has to be awaited for it.

    `what` is how errors call it; else it is the attempt of `ctx`. Raises what the function raises, WorkflowFatalError
    where that is no Exception, WorkflowTimeoutError where it took longer than `limit`.
    """
    started_at = clock.now_us()
    try:
        result = begin(function, argument)
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise _fatal(error, what or _shown(ctx)) from error
    if clock.now_us() - started_at > limit // MICROSECOND and not is_awaitable(result):
        raise _timeout(what or _shown(ctx), limit)
    return result


async def awaited(
    begun: Awaitable[Any], ctx: StepContext, limit: timedelta, clock: Clock, what: str = ""
) -> Any:
    """Await what the function returned; cancel it when `limit` has passed. Raises as `call_now` does."""
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("what is awaited for a step is awaited in a task")
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    timer = clock.call_later(limit // MICROSECOND, expire)
    try:
        return await begun
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        if expired or (isinstance(error, asyncio.CancelledError) and task.cancelling()):
            raise
        if isinstance(error, GeneratorExit) and not _is_running(task):  # it is being closed
            raise
        raise _fatal(error, what or _shown(ctx)) from error
    finally:
        timer.cancel()
        # Whatever the callback made of its cancellation, the attempt is over; unless someone else cancelled too.
        if expired and task.uncancel() <= 0:
            raise _timeout(what or _shown(ctx), limit) from None


async def call(
    function: Callback,
    argument: Any,
    ctx: StepContext,
    path: str,
    limit: timedelta,
    clock: Clock,
    what: str = "",
) -> Any:
    """Call the function in the scope of an attempt, and await its result if that has to be."""
    scope = enter(ctx, path)
    try:
        begun = call_now(function, argument, ctx, limit, clock, what)
        return await awaited(begun, ctx, limit, clock, what) if is_awaitable(begun) else begun
    finally:
        leave(scope)


def is_awaitable(result: Any) -> bool:
    """Whether it has to be awaited."""
    # `inspect.isawaitable` asks an abstract class, at every step that returns plain data.
    kind = type(result)
    return hasattr(kind, "__await__") or (kind is types.GeneratorType and inspect.isawaitable(result))


def _fatal(error: BaseException, what: str) -> WorkflowFatalError:
    return WorkflowFatalError(f"{what} raised {type(error).__name__}({error})")


def _timeout(what: str, limit: timedelta) -> WorkflowTimeoutError:
    return WorkflowTimeoutError(f"{what} ran longer than its timeout of {limit}")


def _shown(ctx: StepContext) -> str:
    return f"step {ctx.step.name!r}, attempt {ctx.attempt},"


def _is_running(task: asyncio.Task[Any]) -> bool:
    try:
        return asyncio.current_task() is task
    except RuntimeError:  # no loop runs any more
        return False

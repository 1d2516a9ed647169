"""One step: look it up, attempt, judge, record. Knows no engine, only the Journal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

from dynflow import calling
from dynflow.clock import MICROSECOND
from dynflow.durations import parse_duration
from dynflow.engines import WITHIN, StepRecord, Store
from dynflow.errors import (
    IsolateCrashedError,
    IsolateLimitError,
    LeaseLostError,
    NonRetryableDelayError,
    ValueTooLargeError,
    WorkflowFatalError,
    WorkflowInternalError,
)
from dynflow.failure import Failure, RemoteError
from dynflow.serialization import encode
from dynflow.step_config import DelayFunction, StepConfig, merge_config
from dynflow.step_host import StepHost, checked_name, final_result, new_record
from dynflow.types import RollbackContext, StepContext, StepInfo
from dynflow.waits import sleep, wait_for_event
from dynflow.workflow import Callback, StepCall

# A delay function answers within this or fails its step (workflows.md section 2).
_DELAY_FUNCTION_TIMEOUT = timedelta(seconds=5)


async def perform(call: StepCall, host: StepHost) -> Any:
    """Perform one call of `step` to its final result, which is stored when this returns or raises."""
    checked_name(call.name)
    record = host.journal.steps.get((call.kind, call.stored_name, call.count))
    if record is not None and record.state in {"complete", "errored"}:
        return final_result(record)
    if call.kind == "do":
        return await attempt_until_final(*prepared(call, record, host), host)
    if record is not None and record.state == "cancelled":
        record = None  # an earlier attempt of the outer step cancelled it: this one waits anew
    if call.kind == "wait_for_event":
        return await wait_for_event(call, record, host)
    return await sleep(call, record, host)


# --- do ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Work:
    """What a step attempts: the tenant's callback, and what it is given at an attempt."""

    name: str
    count: int
    callback: Callback
    config: StepConfig
    delay_function: DelayFunction | None
    argument: Callable[[StepContext], Any] | None = None
    """What makes the callback's argument of the context; None: the context is the argument."""

    def context(self, attempt: int) -> StepContext:
        """Return what the callback is told of an attempt."""
        return StepContext(_step_info(self.name, self.count), attempt, self.config.as_plain())


# A frozen value is dear to make, and the same steps run in every instance of a workflow.
_step_info = lru_cache(maxsize=1_000)(StepInfo)


def prepared(call: StepCall, record: StepRecord | None, host: StepHost) -> tuple[Work, StepRecord]:
    """Check what the call gives; return what to attempt, and the step's record, a new one at its first start.

    Raises WorkflowFatalError.
    """
    checked_name(call.name)
    if not callable(call.callback):
        raise WorkflowFatalError(
            f"step {call.name!r}: the callback must be callable, not {call.callback!r:.100}"
        )
    if call.rollback is not None and not callable(call.rollback):
        raise WorkflowFatalError(f"step {call.name!r}: rollback must be callable, not {call.rollback!r:.100}")
    config, delay_function = _merged(call.config, call.name, host)
    if call.rollback_config is not None:  # refused now, not when it is needed
        _merged(call.rollback_config, f"{call.name} (rollback)", host)
    if record is None:
        if host.do_steps >= host.limits.steps:
            raise WorkflowFatalError(
                f"step {call.name!r}: the instance has its {host.limits.steps:,} steps already"
            )
        record = new_record(call, host, config=config)
    config = record.config or config  # pinned at the first start
    return Work(call.name, call.count, call.callback, config, delay_function), record


async def perform_rollback(call: StepCall, reason: str, host: StepHost) -> Any:
    """Run the rollback handler of `call`, whose step has started, as a step of its own."""
    rolled_back = host.journal.steps[(call.kind, call.stored_name, call.count)]
    config, delay_function = _merged(call.rollback_config, f"{call.name} (rollback)", host)
    record = host.journal.steps.get(("rollback", call.stored_name, call.count))
    if record is None:
        rollback = StepCall("rollback", call.name, call.count, within=call.within)
        record = new_record(rollback, host, config=config)
    output = final_result(rolled_back) if rolled_back.state == "complete" else None
    if call.rollback is None:
        raise WorkflowFatalError(f"step {call.name!r} has no rollback handler")
    work = Work(
        call.name,
        call.count,
        call.rollback,
        record.config or config,
        delay_function,
        lambda ctx: RollbackContext(ctx, reason, output),
    )
    return await attempt_until_final(work, record, host)


def _merged(given: Any, step: str, host: StepHost) -> tuple[StepConfig, DelayFunction | None]:
    return merge_config(given, defaults=host.step_defaults, max_retries=host.limits.retries, step=step)


async def attempt_until_final(work: Work, record: StepRecord, host: StepHost) -> Any:
    """Attempt, wait and attempt again until the step has ended; return its output or raise its error."""
    while record.state not in {"complete", "errored"}:
        if record.state == "waiting":
            await host.wait(record)
        await host.may_start()
        await _attempt(work, record, host)
    return final_result(record)


async def _attempt(work: Work, record: StepRecord, host: StepHost) -> None:
    """Make one attempt and record how it ended: complete, errored, or waiting for the next."""
    open_attempt(record, host)
    await stored(host.journal.begin_attempt, record)
    ctx = work.context(record.attempt)
    argument = ctx if work.argument is None else work.argument(ctx)
    try:
        result = await calling.call(
            work.callback, argument, ctx, record.path, work.config.timeout, host.clock
        )
        complete(record, result, work, host)
    except LeaseLostError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the tenant's callback raises is the attempt's outcome
        await judge(error, work, record, host)
        return
    await stored(host.journal.finish_step, record)


async def stored(store: Store, record: StepRecord) -> None:
    """Store something of a step; return when it is durable, raise where it was not stored."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def told(error: BaseException | None) -> None:
        if done.done():  # whoever awaited it was cancelled
            pass
        elif error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    store(record, told)
    await done


def open_attempt(record: StepRecord, host: StepHost) -> None:
    """Count the attempt that is about to be stored and made."""
    record.attempt += 1
    record.state, record.deadline, record.attempt_at = "running", None, host.clock.now_us()
    if record.attempt == 1:
        record.started_at = record.attempt_at


def complete(record: StepRecord, result: Any, work: Work, host: StepHost) -> None:
    """Note what the callback returned. Raises where that cannot be stored."""
    record.output = _encode_result(result, work.name, host.limits.payload)
    record.state, record.failure, record.ended_at = "complete", None, host.clock.now_us()


async def judge(error: Exception, work: Work, record: StepRecord, host: StepHost) -> None:
    """Record an attempt that failed: the step has failed for good, or another one follows."""
    if isinstance(error, (IsolateCrashedError, IsolateLimitError)):
        host.isolate_down()
    failure = error.failure if isinstance(error, RemoteError) else Failure.of(error)
    record.failure, record.ended_at = failure, host.clock.now_us()
    if not _may_retry(failure, record.attempt, work.config):
        record.state = "errored"
        await stored(host.journal.finish_step, record)
        return
    try:
        delay = await _next_delay(error, work, record, host)
    except NonRetryableDelayError as delay_error:
        record.state, record.failure = "errored", Failure.of(delay_error)
        await stored(host.journal.finish_step, record)
        return
    record.state = "waiting"
    record.deadline = host.clock.now_us() + min(delay, host.limits.wait) // MICROSECOND
    await host.journal.delay_retry(record)


def _may_retry(failure: Failure, attempt: int, config: StepConfig) -> bool:
    if failure.retry == "no" or (failure.retry == "when_configured" and not config.retries_named):
        return False
    return attempt <= config.limit


async def _next_delay(error: Exception, work: Work, record: StepRecord, host: StepHost) -> timedelta:
    attempt = record.attempt
    if work.config.delay is not None:
        return work.config.retry_delay(attempt)
    function, ctx = work.delay_function, work.context(attempt)
    if function is None:  # the config was pinned with a function that the code no longer gives
        raise NonRetryableDelayError(f"step {work.name!r}: its delay function is gone from the code")
    try:
        answer = await calling.call(
            lambda _: function(ctx, error),
            ctx,
            ctx,
            f"{record.path}delay{WITHIN}",
            _DELAY_FUNCTION_TIMEOUT,
            host.clock,
            "the delay function",
        )
        return parse_duration(answer)
    except (
        IsolateCrashedError,
        IsolateLimitError,
    ):  # nobody is left to ask: the next attempt has a new isolate
        host.isolate_down()
        return timedelta(0)
    except Exception as failed:
        raise NonRetryableDelayError(
            f"step {work.name!r}: the delay function failed: {type(failed).__name__}: {failed}"
        ) from failed


def _encode_result(result: Any, step: str, limit: int) -> bytes | None:
    if result is None:
        return None
    try:
        return encode(result, limit=limit, what=f"the result of step {step!r}")
    except ValueTooLargeError as error:
        raise WorkflowInternalError(str(error)) from None

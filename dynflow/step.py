"""One step: look it up, attempt, judge, record. Knows no engine, only the Journal."""

from __future__ import annotations

import asyncio
import copy
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from dynflow.clock import MICROSECOND, Clock, to_microseconds
from dynflow.durations import parse_duration
from dynflow.engines import Journal, Limits, StepRecord
from dynflow.errors import (
    InvalidArgumentError,
    IsolateCrashedError,
    IsolateLimitError,
    LeaseLostError,
    NonRetryableDelayError,
    UnserializableError,
    ValueTooLargeError,
    WorkflowFatalError,
    WorkflowInternalError,
    WorkflowTimeoutError,
)
from dynflow.failure import Failure, RemoteError
from dynflow.instance import check_event_type
from dynflow.serialization import decode, encode
from dynflow.step_config import DelayFunction, StepConfig, merge_config
from dynflow.types import Event, StepContext, StepInfo, StepKind
from dynflow.workflow import StepCall, current_step, invoke

_LONGEST_NAME = 256
# A delay function answers within this or fails its step (workflows.md section 2).
_DELAY_FUNCTION_TIMEOUT = timedelta(seconds=5)


class StepHost(Protocol):
    """What a step needs of its segment."""

    journal: Journal
    clock: Clock
    limits: Limits
    step_defaults: StepConfig

    do_steps: int

    def next_seq(self, kind: StepKind) -> int:
        """Return the place of a new step in the order of starts, and count it."""

    async def may_start(self) -> None:
        """Return when an attempt may start; never while a pause holds."""

    def isolate_down(self) -> None:
        """Say that the isolate ended under an attempt."""

    async def wait(self, record: StepRecord) -> None:
        """Wait durably for `record.deadline` or an event; may never return, then a later segment goes on."""


async def perform(call: StepCall, host: StepHost) -> Any:
    """Perform one call of `step` to its final result, which is stored when this returns or raises."""
    name = _checked_name(call.name)
    record = host.journal.steps.get((call.kind, name, call.count))
    if record is not None and record.state == "complete":
        return _output(record)
    if record is not None and record.state == "errored":
        raise final_error(record)
    if call.kind == "do":
        return await _do(call, record, host)
    if call.kind == "wait_for_event":
        return await _wait_for_event(call, record, host)
    return await _sleep(call, record, host)


def final_error(record: StepRecord) -> BaseException:
    """Return what `await step.…` raises for a step that failed for good."""
    failure = record.failure or Failure(
        "WorkflowInternalError", "the step failed", "dynflow.errors:WorkflowInternalError"
    )
    error = failure.as_step_error(record.name, record.attempt)
    error.failure, error.step, error.attempts = failure, record.name, record.attempt  # type: ignore[attr-defined]
    return error


def _output(record: StepRecord) -> Any:
    return None if record.output is None else decode(record.output)


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= _LONGEST_NAME:
        raise WorkflowFatalError(
            f"{name!r:.100} is not a step name: give a string of 1 to {_LONGEST_NAME} characters"
        )
    if not name.isascii() or not name.isprintable():
        bad = next((char for char in name if unicodedata.category(char) in {"Cc", "Cs"}), None)
        if bad is not None:
            raise WorkflowFatalError(f"step name {name!r:.100} has the control character {bad!r}")
    return name


# --- do ------------------------------------------------------------------------------------------


async def _do(call: StepCall, record: StepRecord | None, host: StepHost) -> Any:
    if not callable(call.callback):
        raise WorkflowFatalError(
            f"step {call.name!r}: the callback must be callable, not {call.callback!r:.100}"
        )
    config, delay_function = merge_config(
        call.config, defaults=host.step_defaults, max_retries=host.limits.retries, step=call.name
    )
    if record is None:
        record = _new_record(call, host, config=config.as_plain())
    elif record.config is not None:
        config = StepConfig.from_plain(record.config)  # pinned at the first start
    while record.state not in {"complete", "errored"}:
        if record.state == "waiting":
            await host.wait(record)
        await host.may_start()
        await _attempt(call, record, config, delay_function, host)
    if record.state == "errored":
        raise final_error(record)
    return _output(record)


def _new_record(call: StepCall, host: StepHost, **fields: Any) -> StepRecord:
    if call.kind == "do" and host.do_steps >= host.limits.steps:
        raise WorkflowFatalError(
            f"step {call.name!r}: the instance has its {host.limits.steps:,} steps already"
        )
    seq = host.next_seq(call.kind)
    record = StepRecord(call.kind, call.name, call.count, seq, started_at=host.clock.now_us(), **fields)
    host.journal.steps[record.key] = record
    return record


async def _attempt(
    call: StepCall,
    record: StepRecord,
    config: StepConfig,
    delay_function: DelayFunction | None,
    host: StepHost,
) -> None:
    """Make one attempt and record how it ended: complete, errored, or waiting for the next."""
    record.attempt += 1
    record.state, record.deadline, record.attempt_at = "running", None, host.clock.now_us()
    await host.journal.begin_attempt(record)
    ctx = StepContext(StepInfo(call.name, call.count), record.attempt, copy.deepcopy(record.config or {}))
    try:
        result = await _call_within(
            host.clock,
            config.timeout,
            call.callback,
            ctx,
            what=f"step {call.name!r}, attempt {record.attempt},",
        )
        record.output = _encode_result(result, call.name, host.limits.payload)
    except LeaseLostError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the tenant's callback raises is the attempt's outcome
        await _judge(error, ctx, record, config, delay_function, host)
        return
    record.state, record.failure, record.ended_at = "complete", None, host.clock.now_us()
    await host.journal.finish_step(record)


async def _judge(
    error: Exception,
    ctx: StepContext,
    record: StepRecord,
    config: StepConfig,
    delay_function: DelayFunction | None,
    host: StepHost,
) -> None:
    if isinstance(error, (IsolateCrashedError, IsolateLimitError)):
        host.isolate_down()
    failure = error.failure if isinstance(error, RemoteError) else Failure.of(error)
    record.failure, record.ended_at = failure, host.clock.now_us()
    if not _may_retry(failure, record.attempt, config):
        record.state = "errored"
        await host.journal.finish_step(record)
        return
    try:
        delay = await _next_delay(error, ctx, config, delay_function, host)
    except NonRetryableDelayError as delay_error:
        record.state, record.failure = "errored", Failure.of(delay_error)
        await host.journal.finish_step(record)
        return
    record.state = "waiting"
    record.deadline = host.clock.now_us() + min(delay, host.limits.wait) // MICROSECOND
    await host.journal.delay_retry(record)


def _may_retry(failure: Failure, attempt: int, config: StepConfig) -> bool:
    if failure.retry == "no" or (failure.retry == "when_configured" and not config.retries_named):
        return False
    return attempt <= config.limit


async def _next_delay(
    error: Exception,
    ctx: StepContext,
    config: StepConfig,
    delay_function: DelayFunction | None,
    host: StepHost,
) -> timedelta:
    if config.delay is not None:
        return config.retry_delay(ctx.attempt)
    if delay_function is None:  # the config was pinned with a function that the code no longer gives
        raise NonRetryableDelayError(f"step {ctx.step.name!r}: its delay function is gone from the code")
    try:
        answer = await _call_within(
            host.clock,
            _DELAY_FUNCTION_TIMEOUT,
            lambda _: delay_function(ctx, error),
            ctx,
            what="the delay function",
        )
        return parse_duration(answer)
    except Exception as failed:  # noqa: BLE001 - a tenant's function may raise anything
        raise NonRetryableDelayError(
            f"step {ctx.step.name!r}: the delay function failed: {type(failed).__name__}: {failed}"
        ) from failed


def _encode_result(result: Any, step: str, limit: int) -> bytes | None:
    if result is None:
        return None
    try:
        return encode(result, limit=limit, what=f"the result of step {step!r}")
    except ValueTooLargeError as error:
        raise WorkflowInternalError(str(error)) from None
    except UnserializableError as error:
        raise UnserializableError(f"step {step!r}: {error}") from None


async def _call_within(
    clock: Clock, limit: timedelta, callback: Callable[..., Any] | None, ctx: StepContext, *, what: str
) -> Any:
    """Call a tenant's function in the scope of the step; cancel it when `limit` has passed."""
    task = asyncio.current_task()
    if task is None or callback is None:
        raise RuntimeError("a step is performed by a task of its own")
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    token = current_step.set(ctx)
    timer = clock.call_at(clock.now_us() + limit // MICROSECOND, expire)
    try:
        return await invoke(callback, ctx)
    except asyncio.CancelledError:
        if expired and task.uncancel() <= 0:
            raise WorkflowTimeoutError(f"{what} ran longer than its timeout of {limit}") from None
        raise
    except SystemExit as error:
        raise WorkflowFatalError(f"{what} called sys.exit({error.code!r})") from None
    finally:
        timer.cancel()
        current_step.reset(token)


# --- sleep, sleep_until, wait_for_event ----------------------------------------------------------


async def _sleep(call: StepCall, record: StepRecord | None, host: StepHost) -> None:
    if record is None:
        deadline = _sleep_deadline(call, host)
        record = _new_record(call, host, state="waiting", deadline=deadline)
        await host.journal.begin_wait(record)
    while record.state == "waiting":
        await host.wait(record)
        await host.journal.end_wait(record)


def _sleep_deadline(call: StepCall, host: StepHost) -> int:
    now = host.clock.now_us()
    try:
        if call.kind == "sleep":
            duration = parse_duration(call.argument)
        else:
            duration = (_moment(call.argument) - now) * MICROSECOND
    except (ValueError, OverflowError) as error:
        raise WorkflowFatalError(f"{call.kind} {call.name!r}: {error}") from None
    if duration > host.limits.wait:
        raise WorkflowFatalError(
            f"{call.kind} {call.name!r}: {duration} is longer than the limit of {host.limits.wait}"
        )
    return now + max(duration, timedelta(0)) // MICROSECOND


def _moment(when: Any) -> int:
    if isinstance(when, datetime) and when.tzinfo is not None:
        return to_microseconds(when.astimezone(UTC))
    if isinstance(when, (int, float)) and not isinstance(when, bool):
        return to_microseconds(datetime.fromtimestamp(when, UTC))
    raise ValueError(f"{when!r:.100} is not a time: give an aware datetime or seconds since the epoch")


async def _wait_for_event(call: StepCall, record: StepRecord | None, host: StepHost) -> Event:
    if record is None:
        deadline = host.clock.now_us() + _event_timeout(call, host) // MICROSECOND
        try:
            event_type = check_event_type(call.event_type)
        except InvalidArgumentError as error:
            raise WorkflowFatalError(f"wait_for_event {call.name!r}: {error}") from None
        record = _new_record(call, host, state="waiting", deadline=deadline, event_type=event_type)
        await host.journal.begin_wait(record)
    while record.state == "waiting":
        await host.wait(record)
        if record.state == "waiting":
            await host.journal.end_wait(record)
    if record.state == "errored":
        raise final_error(record)
    event: Event = _output(record)
    return event


def _event_timeout(call: StepCall, host: StepHost) -> timedelta:
    try:
        timeout = parse_duration(call.argument)
    except ValueError as error:
        raise WorkflowFatalError(f"wait_for_event {call.name!r}: timeout: {error}") from None
    if not timedelta(0) < timeout <= host.limits.wait:
        raise WorkflowFatalError(
            f"wait_for_event {call.name!r}: a timeout is more than zero and at most {host.limits.wait}, not {timeout}"
        )
    return timeout

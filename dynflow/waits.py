"""Durable waits: sleep, sleep_until, wait_for_event. Knows no engine, only the Journal."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from dynflow.clock import MICROSECOND, to_microseconds
from dynflow.durations import parse_duration
from dynflow.engines import StepRecord
from dynflow.errors import InvalidArgumentError, WorkflowFatalError
from dynflow.instance import check_event_type
from dynflow.step_host import StepHost, final_result, new_record
from dynflow.types import Event
from dynflow.workflow import StepCall


async def sleep(call: StepCall, record: StepRecord | None, host: StepHost) -> None:
    """Perform sleep and sleep_until: the deadline is stored before the wait begins."""
    if record is None:
        await host.may_start()
        deadline = _sleep_deadline(call, host)
        record = new_record(call, host, state="waiting", deadline=deadline)
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
    except (ValueError, OverflowError, OSError) as error:
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


async def wait_for_event(call: StepCall, record: StepRecord | None, host: StepHost) -> Event:
    """Wait for an event of the type; raises the timeout, memoised like every final error."""
    if record is None:
        await host.may_start()
        deadline = host.clock.now_us() + _event_timeout(call, host) // MICROSECOND
        try:
            event_type = check_event_type(call.event_type)
        except InvalidArgumentError as error:
            raise WorkflowFatalError(f"wait_for_event {call.name!r}: {error}") from None
        record = new_record(call, host, state="waiting", deadline=deadline, event_type=event_type)
        await host.journal.begin_wait(record)
    while record.state == "waiting":
        await host.wait(record)
        if record.state == "waiting":
            await host.journal.end_wait(record)
    event: Event = final_result(record)
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

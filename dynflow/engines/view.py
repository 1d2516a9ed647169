"""What the instance API shows of what engines keep: status, history, result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from dynflow.clock import MICROSECOND, to_datetime
from dynflow.engines import (
    Completed,
    Failed,
    InstanceRef,
    StepKey,
    StepRecord,
    Terminated,
    outer_name,
    shown_name,
)
from dynflow.engines.happened import Happened
from dynflow.errors import InstanceFailedError, InstanceTerminatedError
from dynflow.failure import Failure
from dynflow.serialization import decode
from dynflow.types import AttemptInfo, ErrorInfo, HistoryEvent, InstanceStatus, Status, StepStatus

REDACTED = "[REDACTED]"


class InstanceRow(NamedTuple):
    """The small row of an instance. `key` is the engine's own; values are encoded, times in microseconds."""

    key: int
    workflow: str
    tenant: str
    id: str
    status: Status
    created_at: int
    started_at: int | None
    ended_at: int | None
    paused_at: int | None
    ending: str | None
    output: bytes | None
    failure: bytes | None
    rollback: bytes | None

    @property
    def ref(self) -> InstanceRef:
        """Its full reference."""
        return InstanceRef(self.workflow, self.id, self.tenant)


def instance_status(
    row: InstanceRow, steps: Mapping[StepKey, StepRecord], attempts: Mapping[int, list[tuple[Any, ...]]]
) -> InstanceStatus:
    """Return an instance as `status()` shows it."""
    failure = None if row.failure is None else decode(row.failure)
    return InstanceStatus(
        id=row.id,
        status=row.status,
        created_at=to_datetime(row.created_at),
        ended_at=_moment(row.ended_at),
        output=None if row.output is None else decode(row.output),
        error=_error(failure),
        rollback=None if row.rollback is None else decode(row.rollback),
        steps=tuple(_step_status(record, attempts.get(record.seq, [])) for record in steps.values()),
    )


def _step_status(record: StepRecord, failed: list[tuple[Any, ...]]) -> StepStatus:
    sensitive = record.config is not None and record.config.sensitive
    output = None if record.output is None else decode(record.output)
    return StepStatus(
        name=shown_name(record.name),
        kind=record.kind,
        count=record.count,
        status=record.state,
        started_at=to_datetime(record.started_at),
        ended_at=_moment(record.ended_at) if record.state in {"complete", "errored", "cancelled"} else None,
        attempts=_attempts(record, failed) if record.kind in {"do", "rollback"} else (),
        output=REDACTED if sensitive and output is not None else output,
        error=_error(record.failure),
        event_type=record.event_type,
        deadline=_moment(record.deadline) if record.state == "waiting" else None,
        within=outer_name(record.name),
    )


def _attempts(record: StepRecord, failed: list[tuple[Any, ...]]) -> tuple[AttemptInfo, ...]:
    shown = [_failed_attempt(*attempt) for attempt in failed]
    # An attempt that failed is among the failed ones, even where its retry was cancelled.
    if record.state != "waiting" and not (failed and failed[-1][0] == record.attempt):
        error = _error(record.failure) if record.state == "errored" else None
        ended = _moment(record.ended_at) if record.state != "running" else None
        shown.append(AttemptInfo(record.attempt, to_datetime(record.attempt_at), ended, error))
    return tuple(shown)


def _failed_attempt(
    number: int, started: int, ended: int | None, failure: bytes | None, retry_at: int | None
) -> AttemptInfo:
    # An attempt without an end was cut off: by a crash of the host, or its shutdown.
    error = (
        ErrorInfo("Interrupted", "the host went down during this attempt")
        if failure is None
        else _error(decode(failure))
    )
    delay = (retry_at - ended) * MICROSECOND if retry_at is not None and ended is not None else None
    return AttemptInfo(number, to_datetime(started), _moment(ended), error, delay)


def _moment(microseconds: int | None) -> datetime | None:
    return None if microseconds is None else to_datetime(microseconds)


def _error(failure: Failure | None) -> ErrorInfo | None:
    return None if failure is None else ErrorInfo(failure.name, failure.message)


def history_events(rows: Iterable[Happened]) -> Iterator[HistoryEvent]:
    """Yield the events of history rows; a row of two types is two events, the second with the row's number."""
    for row in rows:
        first = row.number - len(row.types) + 1
        for offset, kind in enumerate(row.types):
            yield HistoryEvent(first + offset, kind, to_datetime(row.at), dict(row.data))


def end_of(row: InstanceRow) -> Completed | Failed | Terminated:
    """Return how a finished instance ended."""
    if row.status == "complete":
        return Completed(row.output or b"null")
    if row.status == "terminated":
        return Terminated(None)
    failure: Failure = decode(row.failure or b"null") or Failure(
        "WorkflowInternalError", f"instance is {row.status}", ""
    )
    return Failed(failure)


def result_of(end: Completed | Failed | Terminated, instance_id: str) -> Any:
    """Return the output of an instance, or raise its error."""
    if isinstance(end, Completed):
        return decode(end.output)
    if isinstance(end, Terminated):
        raise InstanceTerminatedError(f"instance {instance_id!r} was terminated")
    raise end.failure.rebuild(only_loaded=True) or InstanceFailedError(end.failure.name, end.failure.message)

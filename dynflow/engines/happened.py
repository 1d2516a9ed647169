"""What happened to an instance: numbered events, as every engine keeps and shows them. Event 1: it was queued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dynflow.engines import StepRecord, shown_name
from dynflow.failure import Failure
from dynflow.types import Status


class Happened(NamedTuple):
    """One or two events that happened together; `number` is the last one's. Listeners get it after the commit."""

    number: int
    at: int
    types: tuple[str, ...]
    data: Mapping[str, Any]


def step_data(record: StepRecord, attempt: int | None = None) -> dict[str, Any]:
    """Return what an event says of the step it is about."""
    data: dict[str, Any] = {"step": shown_name(record.name), "count": record.count, "kind": record.kind}
    if record.attempt:
        data["attempt"] = attempt or record.attempt
    if record.event_type is not None:
        data["event_type"] = record.event_type
    return data


def error_data(failure: Failure) -> dict[str, str]:
    """Return what an event says of an error."""
    return {"name": failure.name, "message": failure.message}


def queued(created_at: int) -> Happened:
    """Return the first event of every instance."""
    return Happened(1, created_at, ("workflow.queued",), {})


_ENDED: dict[Status, str] = {
    "complete": "workflow.completed",
    "errored": "workflow.errored",
    "terminated": "workflow.terminated",
}
ENDS = frozenset(_ENDED.values())


def started(at: int, number: int) -> Happened:
    """Return that an instance was claimed for the first time."""
    return Happened(number, at, ("workflow.started", "workflow.running"), {})


def ended(at: int, number: int, status: Status, failure: Failure | None) -> Happened:
    """Return that an instance has come to its end."""
    return Happened(number, at, (_ENDED[status],), {} if failure is None else {"error": error_data(failure)})


_KINDS = {
    kind: (
        (f"{kind}.started", "attempt.started"),
        ("attempt.completed", f"{kind}.completed"),
        ("attempt.errored", f"{kind}.errored"),
    )
    for kind in ("step", "rollback")
}


def first_started(record: StepRecord, number: int) -> Happened:
    """Return what a step's row says of its start."""
    started, _, _ = _KINDS["rollback" if record.kind == "rollback" else "step"]
    return Happened(number, record.started_at, started, step_data(record, attempt=1))


def attempt_started(record: StepRecord, number: int) -> Happened:
    """Return that the record's attempt has started."""
    if record.attempt == 1:
        return first_started(record, number)
    return Happened(number, record.attempt_at, ("attempt.started",), step_data(record))


def step_ended(record: StepRecord, number: int) -> Happened:
    """Return what a step's row says of its end."""
    _, completed, errored = _KINDS["rollback" if record.kind == "rollback" else "step"]
    at, data = record.ended_at or record.attempt_at, step_data(record)
    if record.state == "complete":
        return Happened(number, at, completed, data)
    if record.failure is not None:
        data["error"] = error_data(record.failure)
    return Happened(number, at, errored, data)

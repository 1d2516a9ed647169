"""Values that cross a boundary: what workflows are given, what the instance API answers.

All are frozen. Stdlib only: isolates use them too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from dynflow.serialization import register

StepKind = Literal["do", "sleep", "sleep_until", "wait_for_event", "rollback"]
"""`rollback` is the step that the handler of a `do` step runs as; nobody calls it."""
Status = Literal[
    "queued", "running", "waiting", "waiting_for_pause", "paused", "complete", "errored", "terminated"
]


@register
@dataclass(frozen=True, slots=True)
class Schedule:
    """What started an instance on a schedule: the cron expression and the time it was due."""

    cron: str
    scheduled_at: datetime


@register
@dataclass(frozen=True, slots=True)
class WorkflowEvent:
    """What `run` gets as `event`: why the instance exists.

    `payload` is what `create(params=…)` got, `timestamp` the aware UTC time of creation.
    """

    payload: Any
    timestamp: datetime
    instance_id: str
    workflow_name: str
    schedule: Schedule | None = None


@register
@dataclass(frozen=True, slots=True)
class Event:
    """What `step.wait_for_event` returns; `timestamp` is the aware UTC time at which it was sent."""

    type: str
    payload: Any
    timestamp: datetime


@register
@dataclass(frozen=True, slots=True)
class StepInfo:
    """Which step: its name, and the how-manieth of that name it is (from 1)."""

    name: str
    count: int


@register
@dataclass(frozen=True, slots=True)
class StepContext:
    """What a step callback gets as `ctx`: the step, the attempt (from 1), a private copy of the merged config."""

    step: StepInfo
    attempt: int
    config: dict[str, Any]


@register
@dataclass(frozen=True, slots=True)
class RollbackContext:
    """What a rollback handler gets: the step's context, the error that ended the run, the step's output."""

    ctx: StepContext
    error: str
    output: Any


@register
@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error as the instance API shows it."""

    name: str
    message: str


@register
@dataclass(frozen=True, slots=True)
class AttemptInfo:
    """One attempt of a step; `retry_delay` is the wait that followed it."""

    number: int
    started_at: datetime
    ended_at: datetime | None = None
    error: ErrorInfo | None = None
    retry_delay: timedelta | None = None


@register
@dataclass(frozen=True, slots=True)
class StepStatus:
    """One step of an instance as `status()` shows it. `output` is `[REDACTED]` where it is sensitive.

    `within` is the name of the step that it is a step of, empty for those of the workflow itself.
    """

    name: str
    kind: StepKind
    count: int
    status: Literal["running", "waiting", "complete", "errored", "cancelled"]
    started_at: datetime
    ended_at: datetime | None = None
    attempts: tuple[AttemptInfo, ...] = ()
    output: Any = None
    error: ErrorInfo | None = None
    event_type: str | None = None
    deadline: datetime | None = None
    within: str = ""


@register
@dataclass(frozen=True, slots=True)
class RollbackStatus:
    """How the rollback of an instance ended."""

    outcome: Literal["complete", "failed"]
    error: ErrorInfo | None = None


@register
@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """What `instance.status()` answers."""

    id: str
    status: Status
    created_at: datetime
    ended_at: datetime | None = None
    output: Any = None
    error: ErrorInfo | None = None
    rollback: RollbackStatus | None = None
    steps: tuple[StepStatus, ...] = ()


@register
@dataclass(frozen=True, slots=True)
class HistoryEvent:
    """One thing that happened to an instance, as `instance.subscribe()` yields it.

    `event_id` grows within the instance and is the cursor to go on from. `type` is for example
    `workflow.started` or `step.completed`; `data` names step, count, attempt and error where they apply.
    """

    event_id: int
    type: str
    timestamp: datetime
    data: dict[str, Any] = field(default_factory=dict)


HISTORY_TYPES: frozenset[str] = frozenset(
    f"{what}.{happened}"
    for what, all_that_happens in {
        "workflow": "queued forked started running waiting paused completed errored terminated",
        "step": "started completed errored cancelled",
        "attempt": "started completed errored cancelled",
        "sleep": "started completed cancelled",
        "wait": "started completed timed_out cancelled",
        "rollback": "started completed errored",
    }.items()
    for happened in all_that_happens.split()
)
"""Every `HistoryEvent.type`; `rollback` events are of the steps that handlers run as."""

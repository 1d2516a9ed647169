"""What an instance's status means for a run: its phase, its conclusion, and the words for both. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from ci_platform.errors import Conclusion
from ci_platform.forges import StatusState
from dynflow.types import ErrorInfo, InstanceStatus, StepStatus

Phase = Literal["queued", "running", "waiting", "paused", "finished"]

_PHASES: dict[str, Phase] = {
    "queued": "queued",
    "running": "running",
    "waiting": "waiting",
    "waiting_for_pause": "running",
    "paused": "paused",
    "complete": "finished",
    "errored": "finished",
    "terminated": "finished",
}
# Ours: the platform or the machine, not the tenant. Everything else that ends a run is the tenant's matter.
_OUR_ERRORS = frozenset(
    {
        "EngineClosedError",
        "IsolateCrashedError",
        "LeaseLostError",
        "PlatformError",
        "StorageError",
        "UnavailableError",
    }
)
_TIMEOUTS = frozenset({"WorkflowTimeoutError", "LimitTimeoutError"})
_STATES: dict[Conclusion, StatusState] = {
    "success": "success",
    "failure": "failure",
    "error": "error",
    "cancelled": "error",  # forges have no word for it; the description does
    "timed_out": "failure",
}
_MAX_REASON = 2000


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended; `reason` is for people."""

    conclusion: Conclusion
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """A decision to end a run early, with what it then concludes."""

    conclusion: Conclusion
    reason: str


def phase_of(status: InstanceStatus) -> Phase:
    """Return the run's phase."""
    return _PHASES[status.status]


def waiting_for(status: InstanceStatus) -> str | None:
    """Return what a waiting run waits for, None where it works."""
    if status.status != "waiting":
        return None
    waiting = [step for step in status.steps if step.status == "waiting"]
    gates = [step.name for step in waiting if step.kind == "wait_for_event"]
    if gates:
        return f"approval: {', '.join(gates)}"[:500]
    return ", ".join(_wait_in_words(step) for step in waiting)[:500] or None


def started_at(status: InstanceStatus, created_at: datetime) -> datetime | None:
    """Return when the first step started, None where none has. Steps from before the run are another one's."""
    own = (step.started_at for step in status.steps if step.started_at >= created_at)
    return min(own, default=None)


def outcome_of(status: InstanceStatus, stop: Stop | None, started: datetime | None) -> Outcome | None:
    """Return how the run ended, None while it has not. `stop` is the decision to end it early, if any."""
    if status.status == "complete":
        done = sum(step.kind == "do" for step in status.steps)
        took = f" in {in_words(status.ended_at - started)}" if status.ended_at and started else ""
        return Outcome("success", f"{done} step{'' if done == 1 else 's'} passed{took}")
    if status.status == "terminated":
        return Outcome(stop.conclusion, stop.reason) if stop else Outcome("cancelled", "terminated")
    if status.status == "errored":
        if stop is not None:
            return Outcome(stop.conclusion, stop.reason)
        return _failed(status, status.error or ErrorInfo("Error", "no error was recorded"))
    return None


def shown(status: InstanceStatus) -> tuple[StatusState, str]:
    """Return the commit status of a run that has not ended."""
    if status.status == "queued":
        return "pending", "queued"
    waits_for = waiting_for(status)
    if waits_for is not None:
        return "pending", f"waiting for {waits_for}"
    return "pending", "paused" if status.status == "paused" else "running"


def state_of(conclusion: Conclusion) -> StatusState:
    """Return how forges show a conclusion."""
    return _STATES[conclusion]


def in_words(duration: timedelta) -> str:
    """Return `0.4 s`, `12 s`, `3 min 4 s`, `2 h 5 min`."""
    seconds = max(duration.total_seconds(), 0.0)
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _failed(status: InstanceStatus, error: ErrorInfo) -> Outcome:
    step = _culprit(status, error)
    cause = step.error.name if step is not None and step.error is not None else error.name
    message = step.error.message if step is not None and step.error is not None else error.message
    where = f"{step.name}: " if step is not None else ""
    if {error.name, cause} & _TIMEOUTS:
        if step is not None and step.kind == "wait_for_event":
            return Outcome("timed_out", f"nobody decided {step.name} in time")
        return Outcome("timed_out", f"{where}{message}"[:_MAX_REASON])
    ours = bool({error.name, cause} & _OUR_ERRORS)
    return Outcome("error" if ours else "failure", f"{where}{message or error.name}"[:_MAX_REASON])


def _culprit(status: InstanceStatus, error: ErrorInfo) -> StepStatus | None:
    """Return the step whose error ended the run, as far as error and steps tell."""
    failed = [step for step in status.steps if step.status == "errored" and step.error is not None]
    same = [step for step in failed if step.error is not None and step.error.message == error.message]
    named = [step for step in failed if error.name == "StepFailedError" and repr(step.name) in error.message]
    return next(iter([*same, *named]), None)


def _wait_in_words(step: StepStatus) -> str:
    until = f" until {step.deadline.isoformat(timespec='seconds')}" if step.deadline else ""
    return f"{step.name}{until}"

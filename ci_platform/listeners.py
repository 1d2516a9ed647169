"""What the platform does when the engine says that something has happened to a run."""

from __future__ import annotations

from collections.abc import Callable

from ci_platform.logs import LogKey, Logs
from ci_platform.notices import Notices
from dynflow.engines import InstanceRef
from dynflow.types import HistoryEvent

Listener = Callable[[InstanceRef, HistoryEvent], None]

# Gates open and close, and runs end, before people's eyes; the progress of steps can be a moment late.
_URGENT = frozenset(
    {
        "wait.started",
        "wait.completed",
        "wait.timed_out",
        "workflow.paused",
        "workflow.completed",
        "workflow.errored",
        "workflow.terminated",
    }
)


def closing(logs: Logs, workflow: str) -> Listener:
    """Return what ends the logs of steps and runs that are over, so that who follows them comes to an end."""

    def listener(ref: InstanceRef, event: HistoryEvent) -> None:
        if ref.workflow != workflow:
            return
        if event.type in {"step.completed", "step.errored"}:
            logs.close(LogKey(ref.id, event.data["step"], event.data["count"]))
        elif event.type in {"workflow.completed", "workflow.errored", "workflow.terminated"}:
            logs.close_run(ref.id)

    return listener


def noticing(notices: Notices, workflow: str) -> Listener:
    """Return what has a run looked at when something happens to it: at once where somebody may wait for it."""

    def listener(ref: InstanceRef, event: HistoryEvent) -> None:
        if ref.workflow == workflow:
            notices.add(ref.id, urgent=event.type in _URGENT)

    return listener

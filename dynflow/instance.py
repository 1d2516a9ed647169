"""An instance's statuses, the one table of legal moves, and its id."""

from __future__ import annotations

import re
from typing import Literal

from dynflow.errors import IllegalMoveError, InvalidArgumentError, InvalidInstanceIdError
from dynflow.types import Status

FINISHED: frozenset[Status] = frozenset({"complete", "errored", "terminated"})
UNFINISHED: frozenset[Status] = frozenset({"queued", "running", "waiting", "waiting_for_pause", "paused"})

Move = Literal["pause", "resume", "terminate", "send_event"]

# Which statuses allow a call. `pause` and `resume` are no-ops elsewhere, the others raise.
_ALLOWED: dict[Move, frozenset[Status]] = {
    "pause": frozenset({"queued", "running", "waiting"}),
    "resume": frozenset({"waiting_for_pause", "paused"}),
    "terminate": UNFINISHED,
    "send_event": UNFINISHED,
}
_DOES_NOTHING_ELSEWHERE: frozenset[Move] = frozenset({"pause", "resume"})

_INSTANCE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_WORKFLOW_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
_EVENT_TYPE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")


def may(move: Move, status: Status, instance_id: str) -> bool:
    """Return whether `move` has an effect in `status`; raise IllegalMoveError where it is an error."""
    if status in _ALLOWED[move]:
        return True
    if move in _DOES_NOTHING_ELSEWHERE:
        return False
    raise IllegalMoveError(f"instance {instance_id!r} is {status}: {move} is possible only before the end")


def check_instance_id(value: object) -> str:
    """Return `value` if it is a valid id, else raise InvalidInstanceIdError."""
    if isinstance(value, str) and _INSTANCE_ID.fullmatch(value):
        return value
    raise InvalidInstanceIdError(
        f"{value!r:.120} is not an instance id: give 1 to 100 of A-Z a-z 0-9 _ - that do not start with -"
    )


def check_workflow_name(value: object) -> str:
    """Return `value` if it is a valid workflow name, else raise InvalidArgumentError."""
    if isinstance(value, str) and _WORKFLOW_NAME.fullmatch(value):
        return value
    raise InvalidArgumentError(
        f"{value!r:.120} is not a workflow name: give 1 to 64 of A-Z a-z 0-9 _ -, not - first"
    )


def check_event_type(value: object) -> str:
    """Return `value` if it is a valid event type, else raise InvalidArgumentError."""
    if isinstance(value, str) and _EVENT_TYPE.fullmatch(value):
        return value
    raise InvalidArgumentError(
        f"{value!r:.120} is not an event type: give 1 to 100 of A-Z a-z 0-9 _ -, not - first"
    )

"""An instance's statuses, the one table of legal moves, and its id."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeGuard

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

CREATE_OPTIONS = frozenset({"id", "params", "retention"})
"""What `create` takes, and each item of `create_batch`."""

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


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Return whether `value` is a list or what can stand for one; text is none."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def check_batch(value: object, what: str, limit: int) -> Sequence[Any]:
    """Return `value` if it is a list of 1 to `limit` items, else raise InvalidArgumentError."""
    if not is_list(value):
        raise InvalidArgumentError(f"a batch is a list of 1 to {limit} {what}, not {value!r:.100}")
    if not 1 <= len(value) <= limit:
        raise InvalidArgumentError(f"a batch is a list of 1 to {limit} {what}, not of {len(value)}")
    return value


def check_options(value: object) -> Mapping[str, Any]:
    """Return `value` if it is a dict of create's options, else raise InvalidArgumentError."""
    if isinstance(value, Mapping) and set(value) <= CREATE_OPTIONS:
        return value
    raise InvalidArgumentError(
        f"options, as of each item of a batch, are a dict of {sorted(CREATE_OPTIONS)}, not {value!r:.100}"
    )

"""What a step needs of its segment, and what is common to all kinds of steps: names, records, final results."""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import Callable
from typing import Any, Protocol

from dynflow.clock import Clock
from dynflow.engines import Journal, Limits, StepRecord, shown_name
from dynflow.errors import WorkflowFatalError
from dynflow.failure import Failure
from dynflow.serialization import decode
from dynflow.step_config import StepConfig
from dynflow.workflow import StepCall, current_attempt

_LONGEST_NAME = 256


class StepHost(Protocol):
    """What a step needs of its segment."""

    journal: Journal
    clock: Clock
    limits: Limits
    step_defaults: StepConfig

    do_steps: int

    def next_seq(self) -> int:
        """Return the place of a new step in the order of starts."""

    async def may_start(self) -> None:
        """Return when a step may start; never while a pause holds."""

    def isolate_down(self) -> None:
        """Say that the isolate ended under an attempt."""

    async def wait(self, record: StepRecord) -> None:
        """Wait durably for `record.deadline` or an event; may never return, then a later segment goes on."""


def new_record(call: StepCall, host: StepHost, **fields: Any) -> StepRecord:
    """Return the record of a step that starts now; the journal has it once it is recorded."""
    kind, name, count = call.kind, call.stored_name, call.count
    seq = call.seq or host.next_seq()
    record = StepRecord(kind, name, count, seq, started_at=host.clock.now_us(), **fields)
    host.journal.steps[kind, name, count] = record
    host.do_steps += kind == "do"
    return record


def checked_name(name: Any) -> str:
    """Return `name` if it is a step's name, else raise WorkflowFatalError."""
    if not isinstance(name, str) or not 1 <= len(name) <= _LONGEST_NAME:
        raise WorkflowFatalError(
            f"{name!r:.100} is not a step name: give a string of 1 to {_LONGEST_NAME} characters"
        )
    if not (name.isascii() and name.isprintable()):
        bad = next((char for char in name if unicodedata.category(char) in {"Cc", "Cs"}), None)
        if bad is not None:
            raise WorkflowFatalError(f"step name {name!r:.100} has the control character {bad!r}")
    return name


def final_result(record: StepRecord) -> Any:
    """Return the output of a step that has ended, or raise its error."""
    if record.state == "errored":
        raise final_error(record)
    return None if record.output is None else decode(record.output)


def final_error(record: StepRecord) -> BaseException:
    """Return what `await step.…` raises for a step that failed for good."""
    failure = record.failure or Failure(
        "WorkflowInternalError", "the step failed", "dynflow.errors:WorkflowInternalError"
    )
    name = shown_name(record.name)
    error = failure.as_step_error(name, record.attempt)
    error.failure, error.step, error.attempts = failure, name, record.attempt  # type: ignore[attr-defined]
    return error


def is_inner() -> bool:
    """Whether the step that is called or performed here belongs to an attempt of another one.

    That attempt is under way: a pause lets it finish. And no replay repeats it, so that what it cancelled, a later
    attempt may call again.
    """
    return current_attempt.get() is not None


class StepFuture(asyncio.Future[Any]):
    """The answer of a step call. `on_cancel` is called at once when whoever awaits it cancels it.

    `key` is the step's while it is performed, `task` what performs it if that needs one, `has_begun` whether that
    task only goes on with an attempt.
    """

    key: Any = None
    task: asyncio.Task[None] | None = None
    has_begun: bool = False
    on_cancel: Callable[[StepFuture], None] | None = None

    def cancel(self, msg: Any = None) -> bool:
        """Cancel, and say so."""
        is_cancelled = super().cancel(msg)
        if is_cancelled and self.on_cancel is not None:
            self.on_cancel(self)
        return is_cancelled


def settle(future: asyncio.Future[Any], record: StepRecord) -> None:
    """Answer a call of a step that has ended."""
    try:
        future.set_result(final_result(record))
    except Exception as error:  # noqa: BLE001 - the step's final error, of whatever class the tenant raised
        future.set_exception(error)

"""What errors of `run` mean, and whether a step call was cancelled by the workflow that made it."""

from __future__ import annotations

import asyncio
from typing import Any

from dynflow.errors import WorkflowFatalError
from dynflow.failure import Failure, RemoteError
from dynflow.workflow import PORT_GONE


def failure_of(error: BaseException) -> Failure:
    """Return the failure of an instance whose `run` ended with `error`."""
    if isinstance(error, RemoteError):
        return error.failure
    if isinstance(error, asyncio.CancelledError):
        return Failure.of(WorkflowFatalError("run() was cancelled from inside"))
    if isinstance(error, SystemExit):
        return Failure.of(WorkflowFatalError(f"run() called sys.exit({error.code!r})"))
    return Failure.of(error)


def stuck() -> Failure:
    """Return the failure of an instance that nothing can move any more."""
    return Failure.of(
        WorkflowFatalError(
            "run() waits for something that can never happen: no step, sleep or event wait is outstanding"
        )
    )


def cancelled_by_workflow(call: asyncio.Future[Any] | None) -> bool:
    """Return whether the workflow itself cancelled a step call.

    The end of its isolate does so too, but that is no wish of the workflow: a wait goes on, and an attempt has
    that end as its error.
    """
    if call is None or not call.cancelled():
        return False
    try:
        call.result()
    except asyncio.CancelledError as error:
        return PORT_GONE not in error.args
    return False

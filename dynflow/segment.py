"""Run a workflow from the top until it finishes or only durable waits are left. Knows no engine.

The workflow's `run` goes on a WorkflowLoop; each call of `step` is performed by a task on the host's loop.
A segment is over when `run` is done, or when nothing in it can move by itself: no step call is active, every
activity (the loop, an isolate's session) is idle, and what is left are waits. Then everything is dropped.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dynflow.clock import Clock, TimerHandle
from dynflow.engines import (
    Blocked,
    Completed,
    Failed,
    Interrupted,
    Journal,
    Limits,
    Outcome,
    Paused,
    StepRecord,
)
from dynflow.errors import (
    IsolateCrashedError,
    IsolateLimitError,
    LeaseLostError,
    UnserializableError,
    ValueTooLargeError,
    WorkflowFatalError,
    WorkflowInternalError,
)
from dynflow.failure import Failure, RemoteError
from dynflow.loop import WorkflowLoop
from dynflow.serialization import encode
from dynflow.step import perform
from dynflow.step_config import StepConfig
from dynflow.types import StepKind, WorkflowEvent
from dynflow.workflow import StepCall, WorkflowStep

Main = Callable[[WorkflowEvent, WorkflowStep], Awaitable[Any]]


@dataclass(slots=True)
class _Wait:
    """A durable wait that is outstanding while the segment lives."""

    record: StepRecord
    over: asyncio.Future[None]
    timer: TimerHandle | None = field(default=None)


class _Activity:
    """One part that can make progress by itself (see dynflow.isolates.Activity)."""

    def __init__(self, segment: Segment) -> None:
        self._segment, self._is_active = segment, True
        segment.active_parts += 1

    def active(self) -> None:
        if not self._is_active:
            self._is_active = True
            self._segment.active_parts += 1

    def idle(self) -> None:
        if self._is_active:
            self._is_active = False
            self._segment.active_parts -= 1
            self._segment.look()

    close = idle


class Segment:
    """One activation of an instance. It is the port of the `step` object that `run` gets."""

    def __init__(
        self, event: WorkflowEvent, journal: Journal, clock: Clock, limits: Limits, step_defaults: StepConfig
    ) -> None:
        self.journal, self.clock, self.limits, self.step_defaults = journal, clock, limits, step_defaults
        self.instance_id, self.workflow_name = event.instance_id, event.workflow_name
        self.active_parts = 0
        self.do_steps = sum(1 for kind, _, _ in journal.steps if kind == "do")
        self._event = event
        self._seq = max((record.seq for record in journal.steps.values()), default=0)
        self._host = asyncio.get_running_loop()
        self._outcome: asyncio.Future[Outcome] = self._host.create_future()
        self._calls: set[asyncio.Task[None]] = set()
        self._active_calls = 0
        self._waits: dict[int, _Wait] = {}
        self._pausing = False
        self._held: set[asyncio.Future[None]] = set()
        self._isolate_down = False

    # --- for the engine ---

    async def run(self, main: Main) -> Outcome:
        """Run `main(event, step)`; return how the segment ended. Raises LeaseLostError when aborted.

        When it returns, nothing of the segment is left: tasks, isolates and timers are gone.
        """
        part = _Activity(self)
        loop = WorkflowLoop(self._host, on_idle=part.idle, on_active=part.active)
        step = WorkflowStep(self)
        context = contextvars.copy_context()
        task = loop.create_task(_call_main(main, self._event, step), context=context)
        task.add_done_callback(self._main_done)
        try:
            return await self._outcome
        finally:
            await self._close(loop)

    def deliver(
        self, seq: int, state: str, output: bytes | None, failure: Failure | None, ended_at: int
    ) -> None:
        """Say that the engine has completed the wait `seq` (already durable)."""
        wait = self._waits.get(seq)
        if wait is not None:
            record = wait.record
            record.state, record.output, record.failure, record.ended_at = state, output, failure, ended_at  # type: ignore[assignment]
            _resolve(wait.over)

    def pause(self) -> None:
        """Start no more attempts, end no more waits; the segment ends `Paused` when the running ones are done."""
        self._pausing = True
        self.look()

    def resume(self) -> None:
        """Take a pause back that has not taken effect."""
        self._pausing = False
        for held in self._held:
            _resolve(held)

    def abort(self) -> None:
        """End at once: the instance was terminated or restarted."""
        self._fail_lease(LeaseLostError(f"instance {self.instance_id!r} was taken from this segment"))

    # --- for isolates (SegmentPort) ---

    def activity(self) -> _Activity:
        """Register a part that can make progress by itself, active from now."""
        return _Activity(self)

    async def pin(self, digest: str, modules: Mapping[str, str]) -> Mapping[str, str]:
        """Return the modules the instance is pinned to."""
        return await self.journal.pin(digest, modules)

    def call(self, call: StepCall) -> Awaitable[Any]:
        """Perform a step call in a task on the host's loop; the future belongs to the caller's loop."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._active_calls += 1
        task = self._host.create_task(self._perform(call, future))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        future.add_done_callback(lambda done: task.cancel() if done.cancelled() else None)
        return future

    # --- for steps (StepHost) ---

    def next_seq(self, kind: StepKind) -> int:
        """Return the place of a new step in the order of starts, and count it."""
        self._seq += 1
        self.do_steps += kind == "do"
        return self._seq

    async def may_start(self) -> None:
        """Return when an attempt may start; never while a pause holds."""
        while self._pausing:
            held: asyncio.Future[None] = self._host.create_future()
            self._held.add(held)
            self._active_calls -= 1
            self._look_soon()
            try:
                await held
            finally:
                self._active_calls += 1
                self._held.discard(held)

    def isolate_down(self) -> None:
        """Say that the isolate ended under an attempt; the segment ends `Interrupted` once that is recorded."""
        self._isolate_down = True
        self._look_soon()

    async def wait(self, record: StepRecord) -> None:
        """Wait for the record's deadline or its event."""
        if not self._pausing and record.deadline is not None and record.deadline <= self.clock.now_us():
            return
        wait = _Wait(record, self._host.create_future())
        self._waits[record.seq] = wait
        if record.deadline is not None:
            wait.timer = self.clock.call_at(record.deadline, lambda: self._due(wait))
        self._active_calls -= 1
        self._look_soon()
        try:
            await wait.over
        finally:
            self._active_calls += 1
            del self._waits[record.seq]
            if wait.timer is not None:
                wait.timer.cancel()

    # --- inside ---

    def _due(self, wait: _Wait) -> None:
        if not self._pausing:
            _resolve(wait.over)

    async def _perform(self, call: StepCall, future: asyncio.Future[Any]) -> None:
        try:
            result = await perform(call, self)
        except LeaseLostError as error:
            self._fail_lease(error)
        except Exception as error:  # noqa: BLE001 - the step's final error, of whatever class the tenant raised
            if not future.done():
                future.set_exception(error)
        else:
            if not future.done():
                future.set_result(result)
        finally:
            self._active_calls -= 1
            self._look_soon()

    def _look_soon(self) -> None:
        # Later in this turn of the loop: whoever awaited the call goes on first and says that it is active.
        self._host.call_soon(self.look)

    def look(self) -> None:
        """End the segment if nothing in it can move by itself."""
        if self._outcome.done() or self._active_calls or (self.active_parts and not self._isolate_down):
            return
        if self._isolate_down:
            self._finish(Interrupted())
        elif self._pausing and (self._held or self._waits):
            self._finish(Paused())
        elif self._waits:
            deadlines = [
                wait.record.deadline for wait in self._waits.values() if wait.record.deadline is not None
            ]
            self._finish(Blocked(tuple(sorted(self._waits)), min(deadlines, default=None)))
        else:
            self._finish(Failed(Failure.of(_stuck())))

    def _main_done(self, task: asyncio.Task[Any]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            self._finish(self._completed(task.result()))
        elif isinstance(error, LeaseLostError):
            self._fail_lease(error)
        elif isinstance(error, (IsolateCrashedError, IsolateLimitError)) and (
            self._active_calls or self._isolate_down
        ):
            # It went down under running attempts: they record that, and a new segment goes on.
            self.isolate_down()
        elif isinstance(error, asyncio.CancelledError):
            self._finish(Failed(Failure.of(WorkflowFatalError("run() was cancelled from inside"))))
        else:
            self._finish(Failed(_failure_of(error)))

    def _completed(self, output: Any) -> Outcome:
        try:
            return Completed(encode(output, limit=self.limits.payload, what="the output of run()"))
        except UnserializableError as error:
            return Failed(Failure.of(error))
        except ValueTooLargeError as error:
            return Failed(Failure.of(WorkflowInternalError(str(error))))

    def _finish(self, outcome: Outcome) -> None:
        if not self._outcome.done():
            self._outcome.set_result(outcome)

    def _fail_lease(self, error: LeaseLostError) -> None:
        if not self._outcome.done():
            self._outcome.set_exception(error)

    async def _close(self, loop: WorkflowLoop) -> None:
        left = [*loop.close(), *self._calls]
        for task in left:
            task.cancel()
        while left:  # sandboxes and isolates end in these tasks; the segment is over when they are gone
            await asyncio.wait(left)
            left = [task for task in self._calls if not task.done()]


async def _call_main(main: Main, event: WorkflowEvent, step: WorkflowStep) -> Any:
    return await main(event, step)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _failure_of(error: BaseException) -> Failure:
    if isinstance(error, RemoteError):
        return error.failure
    if isinstance(error, SystemExit):
        return Failure.of(WorkflowFatalError(f"run() called sys.exit({error.code!r})"))
    return Failure.of(error)


def _stuck() -> WorkflowFatalError:
    return WorkflowFatalError(
        "run() waits for something that can never happen: no step, sleep or event wait is outstanding"
    )

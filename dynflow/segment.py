"""Run a workflow from the top until it finishes or only durable waits are left. Knows no engine.

The workflow's `run` goes on a WorkflowLoop; each call of `step` is performed by a task on the host's loop.
A segment is over when `run` is done, or when nothing in it can move by itself: no step call is active, every
activity (the loop, an isolate's session) is idle, and what is left are waits. Then everything is dropped.
"""

from __future__ import annotations

import asyncio
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
    Terminated,
)
from dynflow.errors import (
    EngineClosedError,
    IsolateCrashedError,
    IsolateError,
    IsolateLimitError,
    LeaseLostError,
    StorageError,
    UnserializableError,
    ValueTooLargeError,
    WorkflowFatalError,
    WorkflowInternalError,
)
from dynflow.failure import Failure
from dynflow.liveness import Liveness, Part
from dynflow.loop import WorkflowLoop
from dynflow.rollback import Handlers, roll_back
from dynflow.run_errors import cancelled_by_workflow, failure_of, stuck
from dynflow.serialization import encode
from dynflow.step import perform
from dynflow.step_config import StepConfig
from dynflow.step_host import StepFuture, is_inner, settle
from dynflow.types import ErrorInfo, RollbackStatus, StepKind, WorkflowEvent
from dynflow.workflow import StepCall, WorkflowStep, current_attempt

Main = Callable[[WorkflowEvent, WorkflowStep], Awaitable[Any]]


@dataclass(slots=True, eq=False)
class _Wait:
    """A durable wait that is outstanding while the segment lives."""

    record: StepRecord
    over: asyncio.Future[None]
    inner: bool
    timer: TimerHandle | None = field(default=None)


class Segment:
    """One activation of an instance. It is the port of the `step` object that `run` gets.

    `terminated`: the instance was terminated with a rollback. Steps that have not ended are not performed; once
    nothing moves any more, the handlers of those that had started run.
    """

    def __init__(
        self,
        event: WorkflowEvent,
        journal: Journal,
        clock: Clock,
        limits: Limits,
        step_defaults: StepConfig,
        *,
        terminated: bool = False,
    ) -> None:
        self.journal, self.clock, self.limits, self.step_defaults = journal, clock, limits, step_defaults
        self.instance_id, self.workflow_name = event.instance_id, event.workflow_name
        self.do_steps = self._seq = 0
        for record in journal.steps.values():
            self.do_steps += record.kind == "do"
            self._seq = max(self._seq, record.seq)
        self._event, self._terminated = event, terminated
        self._host = asyncio.get_running_loop()
        self._outcome: asyncio.Future[Outcome] = self._host.create_future()
        self._live = Liveness(self.look, self._host)
        self._part = self._live.part()
        self._waits: dict[int, _Wait] = {}
        self._pausing = self._isolate_down = False
        self._held: set[asyncio.Future[None]] = set()
        self._handlers = Handlers()
        self._rolling_back = False

    # --- for the engine ---

    async def run(self, main: Main) -> Outcome:
        """Run `main(event, step)`; return how the segment ended.

        Raises LeaseLostError when aborted, StorageError or EngineClosedError when the journal did. Then nothing
        of the segment is left: tasks, isolates and timers are gone.
        """
        loop = WorkflowLoop.inside(self._host, on_idle=self._part.idle, on_active=self._part.active)
        loop.now(lambda: self._begin(main, loop))
        try:
            return await self._outcome
        finally:
            await self._close(loop)
            # It refers to the segment: without the circle both go now, and not at a collection.
            self._live.look = _nothing

    def _begin(self, main: Main, loop: WorkflowLoop) -> None:
        task = loop.create_task(_call_main(main, self._event, WorkflowStep(self)))
        task.add_done_callback(self._main_done)

    def deliver(self, ended: StepRecord) -> None:
        """Say that the engine has ended this wait (already durable)."""
        record = self.journal.steps.get(ended.key)
        if record is not None and record.state != "cancelled":
            record.state, record.output, record.failure = ended.state, ended.output, ended.failure
            record.ended_at = ended.ended_at
            if record.seq in self._waits:
                self._live.resolve(self._waits[record.seq].over)

    def pause(self) -> None:
        """Start no more steps, end no more waits; the segment ends `Paused` when running attempts are done."""
        self._pausing = True
        self.look()

    def resume(self) -> None:
        """Take a pause back that has not taken effect."""
        self._pausing = False
        for held in self._held:
            self._live.resolve(held)
        for wait in self._waits.values():
            if wait.record.deadline is not None and wait.record.deadline <= self.clock.now_us():
                self._live.resolve(wait.over)

    def abort(self) -> None:
        """End at once: the instance was terminated, restarted or deleted."""
        self._give_up(LeaseLostError(f"instance {self.instance_id!r} was taken from this segment"))

    # --- for isolates (SegmentPort) ---

    @property
    def is_over(self) -> bool:
        """Whether the workflow's code is being dropped."""
        return self._outcome.done()

    def activity(self) -> Part:
        """Register a part that can make progress by itself, active from now."""
        return self._live.part()

    async def pin(self, digest: str, modules: Mapping[str, str]) -> Mapping[str, str]:
        """Return the modules the instance is pinned to."""
        return await self.journal.pin(digest, modules)

    def call(self, call: StepCall) -> Awaitable[Any]:
        """Perform a step call; the future belongs to the caller's loop. It may never be done: a suspension.

        Cancelling it ends the step for good. A replay never answers that call: what cancelled it does so again.
        """
        future = StepFuture(loop=asyncio.get_running_loop())
        attempt = current_attempt.get()
        if attempt is not None:
            call.within = attempt.path
        key = (call.kind, call.stored_name if isinstance(call.name, str) else repr(call.name), call.count)
        record = self.journal.steps.get(key)
        if self._rolling_back:
            future.set_exception(WorkflowFatalError(f"step {call.name!r:.300} is called while rolling back"))
            return future
        self._handlers.note(call)
        if record is not None and record.state in {"complete", "errored"}:
            settle(future, record)
        elif key in self._live.keys:
            future.set_exception(WorkflowFatalError(f"step {call.name!r:.300} is being performed already"))
        elif not self._terminated and (record is None or record.state != "cancelled" or is_inner()):
            future.task = self._live.start(self._perform(call, future), key)
            future.on_cancel = self._dropped
        return future

    def _dropped(self, future: StepFuture) -> None:
        key = self._live.calls.get(future.task)
        if key is not None and cancelled_by_workflow(future) and not self._outcome.done():
            self._live.stop(future.task)
            self._live.start(self._cancel(key, future.task), ("cancel", key, 0))

    # --- for steps (StepHost) ---

    def next_seq(self, kind: StepKind) -> int:
        """Return the place of a new step in the order of starts, and count it."""
        self._seq += 1
        self.do_steps += kind == "do"
        return self._seq

    async def may_start(self) -> None:
        """Return when a step may start; never while a pause holds."""
        while self._pausing and not is_inner():
            held: asyncio.Future[None] = self._host.create_future()
            self._held.add(held)
            await self._live.inactive(held)
            self._held.discard(held)

    def isolate_down(self) -> None:
        """Say that the isolate ended under an attempt; the segment ends `Interrupted` once that is recorded."""
        self._isolate_down = True
        self._live.look_later()

    async def wait(self, record: StepRecord) -> None:
        """Wait for the record's deadline or its event."""
        inner, deadline = is_inner(), record.deadline
        if (inner or not self._pausing) and deadline is not None and deadline <= self.clock.now_us():
            return
        wait = _Wait(record, self._host.create_future(), inner)
        self._waits[record.seq] = wait
        if record.deadline is not None:
            wait.timer = self.clock.call_at(record.deadline, lambda: self._due(wait))
        try:
            await self._live.inactive(wait.over)
        finally:
            del self._waits[record.seq]
            if wait.timer is not None:
                wait.timer.cancel()

    # --- inside ---

    def _due(self, wait: _Wait) -> None:
        if wait.inner or not self._pausing:
            self._live.resolve(wait.over)

    async def _perform(self, call: StepCall, future: StepFuture) -> None:
        try:
            answer: Any = await perform(call, self)
            how: Callable[[Any], None] = future.set_result
        except (LeaseLostError, StorageError, EngineClosedError) as error:
            self._give_up(error)
            return
        except Exception as error:  # noqa: BLE001 - the step's final error, of whatever class the tenant raised
            answer, how = error, future.set_exception
        except asyncio.CancelledError:  # it will not be answered: nothing else may be left that looks
            self._live.look_later()
            raise
        finally:
            self._live.over(future.task)
        loop = future.get_loop()
        if future.done():
            self._live.look_later()
        elif isinstance(loop, WorkflowLoop):
            loop.now(how, answer)  # it says that it is active, and when it is idle again
        else:
            how(answer)
            self._live.handed_over()

    def _dropped_waits(self) -> list[Any]:
        """Return waits that an earlier segment stored and that nothing of this one is at, now that all is still.

        A replay can cancel a call before it is made, where the first time it had been made and stored.
        """
        return [
            record.key
            for record in self.journal.steps.values()
            if record.state == "waiting" and record.seq not in self._waits and not self._rolling_back
        ]

    async def _cancel(self, key: Any, task: asyncio.Task[None] | None = None) -> None:
        """Record that the workflow cancelled a step, if that was recorded: it takes no event any more."""
        try:
            # An attempt may still end in another way; a wait lets go before others can begin.
            if key[0] == "do" and task is not None:
                await asyncio.wait([task])
            record = self.journal.steps.get(key)
            for waiter in [] if record is None else await self.journal.cancel(record):
                self.deliver(waiter)
        except (LeaseLostError, StorageError, EngineClosedError) as error:
            self._give_up(error)
        except WorkflowInternalError as error:
            self._fail(Failure.of(error))
        finally:
            self._live.over()
            self._live.look_later()

    def look(self) -> None:
        """End the segment if nothing in it can move by itself."""
        if (
            self._outcome.done()
            or self._live.active_calls
            or (self._live.active_parts and not self._isolate_down)
        ):
            return
        if self._isolate_down:
            self._finish(Interrupted())
        elif self._pausing and (self._held or self._waits):
            self._finish(Paused())
        elif self._waits and (dropped := self._dropped_waits()):
            for key in dropped:
                self._live.start(self._cancel(key), ("cancel", key, 0))
        elif self._waits:
            deadlines = [
                wait.record.deadline for wait in self._waits.values() if wait.record.deadline is not None
            ]
            self._finish(Blocked(tuple(sorted(self._waits)), min(deadlines, default=None)))
        elif not self._rolling_back:
            self._fail(stuck())

    def _main_done(self, task: asyncio.Task[Any]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            self._complete(task.result())
        elif isinstance(error, LeaseLostError):
            self._give_up(error)
        elif isinstance(error, (IsolateCrashedError, IsolateLimitError)) and (
            self._live.active_calls or self._isolate_down
        ):
            # It went down under running attempts: they record that, and a new segment goes on.
            self.isolate_down()
        else:
            self._fail(failure_of(error), reachable=not isinstance(error, IsolateError))

    def _complete(self, output: Any) -> None:
        if self._terminated:
            self._fail(stuck())
            return
        try:
            self._finish(Completed(encode(output, limit=self.limits.payload, what="the output of run()")))
        except UnserializableError as error:
            self._fail(Failure.of(error))
        except ValueTooLargeError as error:
            self._fail(Failure.of(WorkflowInternalError(str(error))))

    def _fail(self, failure: Failure, *, reachable: bool = True) -> None:
        """End with an error, or as terminated, after the rollback if there is one.

        Where the isolate is gone, its handlers cannot be reached.
        """
        if self._outcome.done() or self._rolling_back:
            return
        chain = self._handlers.chain(self.journal)
        if not chain:
            self._finish(self._failed(failure, None))
        elif not reachable:
            gone = ErrorInfo(failure.name, "the isolate with the rollback handlers is gone")
            self._finish(self._failed(failure, RollbackStatus("failed", gone)))
        else:
            self._rolling_back = True
            self._live.start(self._roll_back(chain, failure), ("rollback", None, 0))

    async def _roll_back(self, chain: list[StepCall], failure: Failure) -> None:
        others = self._live.calls.keys() - {asyncio.current_task()}
        for task in others:
            self._live.stop(task)
        if others:
            await asyncio.wait(others)
        reason = "the instance was terminated" if self._terminated else str(failure)
        try:
            status = await roll_back(chain, reason, self)
        except (LeaseLostError, StorageError, EngineClosedError) as error:
            self._give_up(error)
        else:
            self._finish(self._failed(failure, status))
        finally:
            self._live.over()

    def _failed(self, failure: Failure, rollback: RollbackStatus | None) -> Outcome:
        return Terminated(rollback) if self._terminated else Failed(failure, rollback)

    def _finish(self, outcome: Outcome) -> None:
        if not self._outcome.done():
            self._outcome.set_result(outcome)

    def _give_up(self, error: LeaseLostError | StorageError | EngineClosedError) -> None:
        if not self._outcome.done():
            self._outcome.set_exception(error)
            self._outcome.exception()  # nobody may have asked for it yet, nor ever will

    async def _close(self, loop: WorkflowLoop) -> None:
        left = await self._live.close(loop.discard())
        if left:
            message = (
                f"{len(left)} task(s) of instance {self.instance_id!r} refuse to be cancelled: {left!r:.500}"
            )
            self._host.call_exception_handler({"message": message})


async def _call_main(main: Main, event: WorkflowEvent, step: WorkflowStep) -> Any:
    return await main(event, step)


def _nothing() -> None:
    pass

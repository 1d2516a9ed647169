"""Run a workflow from the top until it finishes or only durable waits are left. Knows no engine.

The workflow's `run` goes on a WorkflowLoop; each call of `step` is performed by a task on the host's loop.
A segment is over when `run` is done, or when nothing in it can move by itself: no step call is active, every
activity (the loop, an isolate's session) is idle, and what is left are waits. Then everything is dropped.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from dynflow.clock import Clock
from dynflow.engines import (
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
from dynflow.first_attempt import FirstAttempt
from dynflow.liveness import Liveness, Part
from dynflow.loop import WorkflowLoop
from dynflow.outstanding import OutstandingWaits
from dynflow.rollback import Handlers, roll_back
from dynflow.run_errors import cancelled_by_workflow, failure_of, stuck
from dynflow.serialization import encode
from dynflow.step import perform
from dynflow.step_config import StepConfig
from dynflow.step_host import StepFuture, is_inner, settle
from dynflow.types import ErrorInfo, RollbackStatus, WorkflowEvent
from dynflow.workflow import StepCall, WorkflowStep, current_attempt

Main = Callable[[WorkflowEvent, WorkflowStep], Coroutine[Any, Any, Any]]
Work = Callable[[], Coroutine[Any, Any, Any]]


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
        self._waits = OutstandingWaits(self._live, clock)
        self._isolate_down = False
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
        loop.now(self._begin_main, main, loop)
        try:
            return await self._outcome
        finally:
            await self._close(loop)
            # It refers to the segment: without the circle both go now, and not at a collection.
            self._live.look = _nothing

    def _begin_main(self, main: Main, loop: WorkflowLoop) -> None:
        task = loop.begin(main(self._event, WorkflowStep(self)))
        task.add_done_callback(self._main_done)

    def deliver(self, ended: StepRecord) -> None:
        """Say that the engine has ended this wait (already durable)."""
        record = self.journal.steps.get(ended.key)
        if record is not None and record.state != "cancelled":
            record.state, record.output, record.failure = ended.state, ended.output, ended.failure
            record.ended_at = ended.ended_at
            self._waits.end(record)

    def pause(self) -> None:
        """Start no more steps, end no more waits; the segment ends `Paused` when running attempts are done."""
        self._waits.held = True
        self.look()

    def resume(self) -> None:
        """Take a pause back that has not taken effect."""
        self._waits.release()
        for held in self._held:
            self._live.resolve(held)

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
            future.key, future.on_cancel = key, self._dropped
            starts_now = record is None and not self._waits.held
            if starts_now:  # tasks begin later: the order of starts is that of the calls
                call.seq = self.next_seq()
            if call.kind == "do" and starts_now:
                self._begin(call, future)
            else:
                future.task = self._live.start(self._perform(lambda: perform(call, self), future), key)
        return future

    def _begin(self, call: StepCall, future: StepFuture) -> None:
        try:
            first = FirstAttempt(call, future, self)
        except WorkflowFatalError as error:
            future.set_exception(error)
        else:
            self._live.begin(future.key)
            first.begin()

    def _dropped(self, future: StepFuture) -> None:
        key, task = future.key, future.task
        if key in self._live.keys and cancelled_by_workflow(future) and not self._outcome.done():
            if future.has_begun and task is not None:  # it shall get to awaiting what its callback has begun
                self._host.call_soon(task.cancel)
            elif task is not None:
                self._live.stop(task)
            self._live.start(self._cancel(key, future), ("cancel", key, 0))

    # --- for steps (StepHost) ---

    def next_seq(self) -> int:
        """Return the place of a new step in the order of starts."""
        self._seq += 1
        return self._seq

    async def may_start(self) -> None:
        """Return when a step may start; never while a pause holds."""
        while self._waits.held and not is_inner():
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
        await self._waits.wait(record)

    # --- for first attempts (FirstAttemptHost) ---

    def is_wanted(self, future: StepFuture) -> bool:
        """Whether the step of this call is to be performed still. The end of an isolate takes nothing back."""
        return not (cancelled_by_workflow(future) or self._rolling_back or self._outcome.done())

    def answer(self, future: StepFuture, result: Any, error: BaseException | None = None) -> None:
        """End a call that had no task."""
        self._live.end(future.key)
        self._answer(future, result, error)

    def go_on(self, future: StepFuture, work: Work, context: contextvars.Context) -> None:
        """Perform the rest of a call in a task."""
        self._live.end(future.key)
        future.task = self._live.start(self._perform(work, future), future.key, context)
        future.has_begun = True
        if cancelled_by_workflow(future):  # while its callback was called
            self._host.call_soon(future.task.cancel)

    # --- inside ---

    async def _perform(self, work: Work, future: StepFuture) -> None:
        answer: Any = None
        failed: Exception | None = None
        try:
            answer = await work()
        except Exception as error:  # noqa: BLE001 - the step's final error, of whatever class the tenant raised
            failed = error
        except asyncio.CancelledError:  # it will not be answered: nothing else may be left that looks
            self._live.look_later()
            raise
        finally:
            self._live.over(future.task)
        self._answer(future, answer, failed)

    def _answer(self, future: StepFuture, answer: Any, error: BaseException | None) -> None:
        if isinstance(error, (LeaseLostError, StorageError, EngineClosedError)):
            self._give_up(error)
            return
        how: Callable[[Any], None] = future.set_result
        if error is not None:
            how, answer = future.set_exception, error
        loop = future.get_loop()
        if future.done() or self._rolling_back:
            self._live.look_later()
        elif isinstance(loop, WorkflowLoop):
            loop.now(how, answer)  # it says that it is active, and when it is idle again
        else:
            how(answer)
            self._live.handed_over()

    async def _cancel(self, key: Any, future: StepFuture | None = None) -> None:
        """Record that the workflow cancelled a step, if that was recorded: it takes no event any more."""
        try:
            # An attempt may still end in another way; a wait lets go before others can begin.
            if key[0] == "do" and future is not None and future.task is not None:
                await asyncio.wait([future.task])
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
        elif self._waits.held and (self._held or self._waits):
            self._finish(Paused())
        elif (
            self._waits
            and not self._rolling_back
            and (dropped := self._waits.dropped(self.journal.steps.values()))
        ):
            for key in dropped:
                self._live.start(self._cancel(key), ("cancel", key, 0))
        elif self._waits:
            self._finish(self._waits.blocked())
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


def _nothing() -> None:
    pass

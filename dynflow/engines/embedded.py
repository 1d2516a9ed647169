"""The embedded engine: one SQLite file, one writer thread, nothing to set up.

It claims queued instances in the order of their ranks, runs their segments on the event loop, keeps one timer
for the earliest deadline of all waiting instances, and on start goes on with what a gone process was running.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from dynflow.binding import WorkflowBinding, tenant_of
from dynflow.clock import Clock, SystemClock, TimerHandle, to_datetime
from dynflow.engines import (
    Blocked,
    Completed,
    Engine,
    Failed,
    InstanceRef,
    Interrupted,
    Journal,
    Limits,
    Listener,
    NewInstance,
    Outcome,
    Paused,
    StepKey,
    StepRecord,
)
from dynflow.engines import rows as sql
from dynflow.engines.rows import FairQueue, Happened, InstanceRow
from dynflow.engines.view import history_events, instance_status, raise_result
from dynflow.engines.writer import Operation, Synchronous, Writer
from dynflow.errors import (
    EngineClosedError,
    InstanceNotFoundError,
    InvalidArgumentError,
    IsolateCrashedError,
    LeaseLostError,
    StorageError,
    WorkflowInternalError,
    WorkflowTimeoutError,
)
from dynflow.failure import Failure
from dynflow.instance import FINISHED, check_workflow_name, may
from dynflow.router import DynamicWorkflowBinding
from dynflow.segment import Main, Segment
from dynflow.serialization import decode
from dynflow.step_config import StepConfig, merge_config
from dynflow.types import HistoryEvent, InstanceStatus, WorkflowEvent
from dynflow.workflow import ExecutionContext, WorkflowEntrypoint, current_env

# An isolate that goes down by itself is tried again this often before the instance fails with it.
_MOST_CRASHES = 3
_HISTORY_PAGE = 500


@dataclass(frozen=True, slots=True)
class _Registered:
    entrypoint: type[WorkflowEntrypoint]
    env: Any
    step_defaults: StepConfig


@dataclass(slots=True)
class _Live:
    """An instance that runs here: its segment, once that is made, and a pause asked for before."""

    segment: Segment | None = None
    task: asyncio.Task[None] | None = None
    crashes: int = 0


@dataclass(slots=True)
class _Watch:
    """Who follows an instance: woken at each of its events."""

    changed: asyncio.Event = field(default_factory=asyncio.Event)
    watchers: int = 0


class EmbeddedEngine(Engine):
    """Durable workflows in one file. Use inside `async with`, after `register`.

    `path`: the SQLite file, created where missing. `synchronous="FULL"`: what was acknowledged survives power
    loss; `"NORMAL"`: a process crash only. `concurrency`: how many instances run at a time (waiting ones do not
    count). `tenant_key`: the metadata key, or a function of the metadata, that says whose an instance is.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        clock: Clock | None = None,
        synchronous: Synchronous = "FULL",
        concurrency: int = 500,
        tenant_key: str | Callable[[Any], str] = "tenant_id",
        limits: Limits | None = None,
    ) -> None:
        if concurrency < 1:
            raise InvalidArgumentError(f"concurrency must be at least 1, not {concurrency!r}")
        if synchronous not in ("FULL", "NORMAL"):
            raise InvalidArgumentError(f'synchronous must be "FULL" or "NORMAL", not {synchronous!r}')
        self.limits = limits or Limits()
        self.clock: Clock = clock or SystemClock()
        self._path, self._synchronous, self._concurrency = Path(path), synchronous, concurrency
        self._tenant_key = tenant_key
        self._registered: dict[str, _Registered] = {}
        self._listeners: list[Listener] = []
        self._live: dict[int, _Live] = {}
        self._watches: dict[int, _Watch] = {}
        self._crashes: dict[int, int] = {}
        self._writer: Writer | None = None
        self._claiming = False
        self._more_queued = False
        self._timer: TimerHandle | None = None
        self._timer_at: int | None = None

    # --- setting up ---

    def register(
        self,
        name: str,
        entrypoint: type[WorkflowEntrypoint],
        *,
        env: Any = None,
        binding: str | None = None,
        step_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Make a workflow known: a class made by `create_dynamic_workflow_entrypoint`, or one of the host's own.

        `env` becomes `self.env` (a dict's items are attributes too). `binding`: under this name the loaders in
        `env` give tenants the workflow. `step_defaults`: a step config in place of the contract's defaults.
        """
        check_workflow_name(name)
        if not isinstance(entrypoint, type) or not callable(getattr(entrypoint, "run", None)):
            raise InvalidArgumentError(f"{entrypoint!r} is not a class with run(event, step)")
        defaults, _ = merge_config(
            step_defaults, defaults=StepConfig(), max_retries=self.limits.retries, step="(defaults)"
        )
        bound = Env(env) if isinstance(env, Mapping) else env
        self._registered[name] = _Registered(entrypoint, bound, defaults)
        if binding is not None:
            raw = self.binding(name)
            for item in env.values() if isinstance(env, Mapping) else ():
                if hasattr(item, "bind"):
                    item.bind(binding, partial(DynamicWorkflowBinding, raw))

    def binding(self, name: str) -> WorkflowBinding:
        """Return the raw binding of a registered workflow: it reaches all tenants' instances."""
        if name not in self._registered:
            raise InvalidArgumentError(
                f"no workflow {name!r} is registered; registered are {sorted(self._registered)}"
            )
        return WorkflowBinding(self, name, tenant=None, tenant_key=self._tenant_key)

    def add_listener(self, listener: Listener) -> None:
        """Call `listener(ref, event)` on the event loop after each history event is durable."""
        self._listeners.append(listener)

    async def __aenter__(self) -> Self:
        if self._writer is not None:
            raise EngineClosedError("the engine is open already")
        self._writer = await asyncio.to_thread(
            _open_writer, self._path, self._synchronous, asyncio.get_running_loop()
        )

        def start(db: Any) -> tuple[FairQueue, int | None]:
            queue = FairQueue(db)
            sql.recover(db, queue)
            return queue, sql.next_wake(db)

        self._queue, wake_at = await self._writer.submit(start)
        self._arm(wake_at)
        self._pump()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Stop: running attempts are cancelled and count as made; everything goes on at the next start."""
        writer = self._writer
        if writer is None:
            return
        self._writer = None
        if self._timer is not None:
            self._timer.cancel()
        tasks = [live.task for live in self._live.values() if live.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for watch in self._watches.values():
            watch.changed.set()
        await writer.close()

    # --- Engine ---

    async def create(self, workflow: str, tenant: str, items: Sequence[NewInstance]) -> list[bool]:
        """Queue instances; False in the place of each whose id exists."""
        now = self.clock.now_us()
        created = await self._submit(lambda db: sql.create(db, self._queue, workflow, tenant, items, now))
        for item, made in zip(items, created, strict=True):
            if made is not None:
                self._tell(made[0], InstanceRef(workflow, item.id, tenant), [made[1]])
        self._pump()
        return [made is not None for made in created]

    async def find(self, ref: InstanceRef) -> InstanceRef:
        """Return the reference with its tenant."""
        return (await self._submit(lambda db: sql.find(db, ref))).ref

    async def status(self, ref: InstanceRef) -> InstanceStatus:
        """Return status, result and steps."""

        def read(db: Any) -> InstanceStatus:
            row = sql.find(db, ref)
            return instance_status(row, sql.load_steps(db, row.key), sql.load_attempts(db, row.key))

        return await self._submit(read)

    async def control(
        self, ref: InstanceRef, move: Literal["pause", "resume", "terminate"], *, rollback: bool = False
    ) -> None:
        """Pause, resume or terminate."""
        if rollback:
            raise InvalidArgumentError("terminate(rollback=True): rollback is not part of this release")
        await {"pause": self._pause, "resume": self._resume, "terminate": self._terminate}[move](ref)

    async def _pause(self, ref: InstanceRef) -> None:
        now = self.clock.now_us()

        def write(db: Any) -> tuple[InstanceRow, bool, Happened | None]:
            row = sql.find(db, ref)
            if not may("pause", row.status, row.id):
                return row, False, None
            return row, row.status == "running", sql.pause(db, row.key, now, live=row.status == "running")

        row, live, happened = await self._submit(write)
        if live and row.key in self._live:
            segment = self._live[row.key].segment
            if segment is not None:
                segment.pause()
        self._tell(row.key, row.ref, [happened])

    async def _resume(self, ref: InstanceRef) -> None:
        now = self.clock.now_us()

        def write(db: Any) -> tuple[InstanceRow, list[Happened | None]]:
            row = sql.find(db, ref)
            if not may("resume", row.status, row.id):
                return row, []
            happened = [sql.resume(db, self._queue, row, now)]
            return row, [*happened, *(event for _, event in sql.deliver_buffered(db, row.key, now))]

        row, happened = await self._submit(write)
        if row.status == "waiting_for_pause" and row.key in self._live:
            segment = self._live[row.key].segment
            if segment is not None:
                segment.resume()
        self._tell(row.key, row.ref, happened)
        self._pump()

    async def _terminate(self, ref: InstanceRef) -> None:
        now = self.clock.now_us()

        def write(db: Any) -> tuple[InstanceRow, Happened]:
            row = sql.find(db, ref)
            may("terminate", row.status, row.id)
            return row, sql.finish(db, row.key, None, "terminated", now)

        row, happened = await self._submit(write)
        await self._abort(row.key)
        self._tell(row.key, row.ref, [happened])

    async def restart(self, ref: InstanceRef, from_step: StepKey | None) -> None:
        """Start again, keeping what was started before `from_step`."""
        now = self.clock.now_us()

        def write(db: Any) -> tuple[InstanceRow, Happened]:
            row = sql.find(db, ref)
            return row, sql.restart(db, self._queue, row, from_step, now)

        row, happened = await self._submit(write)
        self._crashes.pop(row.key, None)
        await self._abort(row.key)
        self._tell(row.key, row.ref, [happened])
        self._pump()

    async def send_event(self, ref: InstanceRef, event_type: str, payload: bytes) -> None:
        """Deliver or buffer an event."""
        now = self.clock.now_us()

        def write(db: Any) -> tuple[InstanceRow, StepRecord | None, Happened | None]:
            row = sql.find(db, ref)
            may("send_event", row.status, row.id)
            waiter, happened = sql.send_event(db, row, event_type, payload, now)
            if waiter is not None and row.status == "waiting":
                sql.requeue(db, self._queue, row.key)
            return row, waiter, happened

        row, waiter, happened = await self._submit(write)
        live = self._live.get(row.key)
        if waiter is not None and live is not None and live.segment is not None:
            live.segment.deliver(waiter.seq, waiter.state, waiter.output, waiter.failure, now)
        self._tell(row.key, row.ref, [happened])
        self._pump()

    async def delete(self, refs: Sequence[InstanceRef]) -> list[bool]:
        """Delete instances with all they have."""

        def write(db: Any) -> list[int | None]:
            found: list[int | None] = []
            for ref in refs:
                try:
                    key = sql.find(db, ref).key
                except InstanceNotFoundError:
                    found.append(None)
                    continue
                sql.delete(db, key)
                found.append(key)
            return found

        keys = await self._submit(write)
        for key in keys:
            if key is not None:
                await self._abort(key)
                self._wake_watchers(key)
        return [key is not None for key in keys]

    async def history(self, ref: InstanceRef, cursor: int) -> AsyncIterator[HistoryEvent]:
        """Yield what happened after `cursor`, then what happens, up to the end of the instance."""
        row = await self._submit(lambda db: sql.find(db, ref))
        watch = self._watches.setdefault(row.key, _Watch())
        watch.watchers += 1
        try:
            while True:
                watch.changed.clear()
                page, status = await self._submit(
                    lambda db, after=cursor: (
                        sql.load_history(db, row.key, after, _HISTORY_PAGE),
                        _status_of(db, row.key),
                    )
                )
                for event in history_events(page):
                    if event.event_id > cursor:
                        cursor = event.event_id
                        yield event
                if not page:
                    if status in FINISHED or status is None or self._writer is None:
                        return
                    await watch.changed.wait()
        finally:
            watch.watchers -= 1
            if not watch.watchers:
                self._watches.pop(row.key, None)

    async def result(self, ref: InstanceRef) -> Any:
        """Wait for the end; return the output or raise the instance's error."""
        async with contextlib.aclosing(self.history(ref, 0)) as events:
            async for _ in events:
                pass
        return raise_result(await self._submit(lambda db: sql.find(db, ref)))

    # --- scheduling ---

    def _submit(self, operation: Operation[Any]) -> asyncio.Future[Any]:
        if self._writer is None:
            raise EngineClosedError("the engine is closed: use it inside `async with engine`")
        return self._writer.submit(operation)

    def _pump(self) -> None:
        """Claim as many queued instances as there are free slots."""
        if self._writer is None:
            return
        if self._claiming:
            self._more_queued = True
            return
        free = self._concurrency - len(self._live)
        if free <= 0:
            return
        self._claiming, self._more_queued = True, False
        now = self.clock.now_us()
        claim = self._submit(lambda db: sql.claim(db, self._queue, min(free, 200), self._registered, now))
        claim.add_done_callback(self._claimed)

    def _claimed(self, claim: asyncio.Future[Any]) -> None:
        self._claiming = False
        if claim.cancelled() or claim.exception() is not None or self._writer is None:
            return
        claimed = claim.result()
        for row, params, schedule, steps, happened in claimed:
            self._tell(row.key, row.ref, [happened])
            journal = EmbeddedJournal(self, row, steps)
            live = self._live[row.key] = _Live()
            live.task = asyncio.get_running_loop().create_task(
                self._run(live, row, params, schedule, journal)
            )
        if claimed or self._more_queued:
            self._pump()

    async def _run(
        self, live: _Live, row: InstanceRow, params: bytes, schedule: bytes | None, journal: EmbeddedJournal
    ) -> None:
        registered = self._registered[row.workflow]
        event = WorkflowEvent(
            decode(params),
            to_datetime(row.created_at),
            row.id,
            row.workflow,
            None if schedule is None else decode(schedule),
        )
        segment = live.segment = Segment(event, journal, self.clock, self.limits, registered.step_defaults)
        try:
            outcome = await segment.run(_main_of(registered))
            await self._settle(row, outcome)
        except (LeaseLostError, EngineClosedError):
            pass  # whoever took the instance has said what becomes of it
        except StorageError as error:
            await self._settle(row, Failed(Failure.of(WorkflowInternalError(str(error)))))
        finally:
            if self._live.get(row.key) is live:
                del self._live[row.key]
            self._pump()

    async def _settle(self, row: InstanceRow, outcome: Outcome) -> None:
        """Store how a segment ended."""
        now = self.clock.now_us()
        if isinstance(outcome, Failed) and self._may_try_again(row.key, outcome.failure):
            outcome = Interrupted()

        def write(db: Any) -> tuple[Happened | None, int | None]:
            match outcome:
                case Completed(output):
                    return sql.finish(db, row.key, row.epoch, "complete", now, output=output), None
                case Failed(failure):
                    return sql.finish(db, row.key, row.epoch, "errored", now, failure=failure), None
                case Paused():
                    return sql.paused(db, row.key, row.epoch, now), None
                case Blocked(waits, wake_at):
                    if _status_of(db, row.key) == "waiting_for_pause":
                        return sql.paused(db, row.key, row.epoch, now), None
                    happened, parked = sql.park(db, self._queue, row.key, row.epoch, waits, wake_at, now)
                    return happened, wake_at if parked else None
                case Interrupted():
                    sql.fence(db, row.key, row.epoch)
                    sql.requeue(db, self._queue, row.key)
                    return None, None

        happened, wake_at = await self._submit(write)
        if isinstance(outcome, (Completed, Failed)):
            self._crashes.pop(row.key, None)
        self._tell(row.key, row.ref, [happened])
        self._arm(wake_at)

    def _may_try_again(self, key: int, failure: Failure) -> bool:
        crashed = f"{IsolateCrashedError.__module__}:{IsolateCrashedError.__qualname__}"
        if failure.type != crashed:
            return False
        self._crashes[key] = self._crashes.get(key, 0) + 1
        return self._crashes[key] < _MOST_CRASHES

    async def _abort(self, key: int) -> None:
        live = self._live.get(key)
        if live is None or live.task is None or live.task is asyncio.current_task():
            return
        if live.segment is not None:
            live.segment.abort()
        else:
            live.task.cancel()
        await asyncio.wait([live.task])

    def _arm(self, wake_at: int | None) -> None:
        """Make the timer fire no later than `wake_at`."""
        if (
            wake_at is None
            or self._writer is None
            or (self._timer_at is not None and self._timer_at <= wake_at)
        ):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = wake_at
        self._timer = self.clock.call_at(wake_at, self._wake)

    def _wake(self) -> None:
        self._timer = self._timer_at = None
        if self._writer is None:
            return
        now = self.clock.now_us()
        woken = self._submit(lambda db: sql.wake_due(db, self._queue, now))

        def after(done: asyncio.Future[int | None]) -> None:
            if not done.cancelled() and done.exception() is None:
                self._arm(done.result())
                self._pump()

        woken.add_done_callback(after)

    # --- telling ---

    def _tell(self, key: int, ref: InstanceRef, happened: Iterable[Happened | None]) -> None:
        real = [item for item in happened if item is not None]
        if not real:
            return
        self._wake_watchers(key)
        if self._listeners:
            for event in history_events(real):
                for listener in self._listeners:
                    listener(ref, event)

    def _wake_watchers(self, key: int) -> None:
        watch = self._watches.get(key)
        if watch is not None:
            watch.changed.set()


class Env(dict[str, Any]):
    """A dict whose items are attributes too: `env.WORKFLOWS` and `env["WORKFLOWS"]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"env has no binding {name!r}; it has {sorted(self)}") from None


class EmbeddedJournal(Journal):
    """The journal of one segment: every record is fenced by the lease's epoch."""

    def __init__(self, engine: EmbeddedEngine, row: InstanceRow, steps: dict[StepKey, StepRecord]) -> None:
        self.steps = steps
        self._engine, self._row = engine, row

    async def begin_attempt(self, record: StepRecord) -> None:
        """Store that an attempt starts."""
        await self._write(lambda db: [sql.begin_attempt(db, self._row.key, self._row.epoch, record)])

    async def finish_step(self, record: StepRecord) -> None:
        """Store a step's final state."""
        await self._write(lambda db: [sql.finish_step(db, self._row.key, self._row.epoch, record)])

    async def delay_retry(self, record: StepRecord) -> None:
        """Store a failed attempt."""
        await self._write(lambda db: [sql.delay_retry(db, self._row.key, self._row.epoch, record)])

    async def begin_wait(self, record: StepRecord) -> None:
        """Store a sleep or a wait."""
        await self._write(lambda db: sql.begin_wait(db, self._row.key, self._row.epoch, record))

    async def end_wait(self, record: StepRecord) -> None:
        """End a wait whose deadline has passed."""
        timed_out = Failure.of(
            WorkflowTimeoutError(
                f"wait_for_event {record.name!r}: no event of type {record.event_type!r} came in time"
            )
        )
        now = self._engine.clock.now_us()
        await self._write(lambda db: sql.end_wait(db, self._row.key, self._row.epoch, record, timed_out, now))

    async def pin(self, digest: str, modules: Mapping[str, str]) -> Mapping[str, str]:
        """Return the pinned code."""
        pinned: Mapping[str, str] = await self._engine._submit(  # noqa: SLF001 - the journal is the engine's own half
            lambda db: sql.pin(db, self._row.key, self._row.epoch, digest, modules)
        )
        return pinned

    async def _write(self, operation: Operation[list[Happened]]) -> None:
        happened = await self._engine._submit(operation)  # noqa: SLF001 - as above
        self._engine._tell(self._row.key, self._row.ref, happened)  # noqa: SLF001 - as above


def _main_of(registered: _Registered) -> Main:
    async def main(event: WorkflowEvent, step: Any) -> Any:
        current_env.set(registered.env)
        return await registered.entrypoint(ExecutionContext(), registered.env).run(event, step)

    return main


def _status_of(db: Any, key: int) -> Any:
    row = db.execute("SELECT status FROM instances WHERE key = ?", (key,)).fetchone()
    return None if row is None else row[0]


def _open_writer(path: Path, synchronous: Synchronous, loop: asyncio.AbstractEventLoop) -> Writer:
    return Writer(path, synchronous, loop)


__all__ = ["EmbeddedEngine", "EmbeddedJournal", "tenant_of"]

"""The embedded engine as its users see it: registration, the instance API, history and results."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self

from dynflow.binding import WorkflowBinding
from dynflow.clock import Clock, SystemClock
from dynflow.durations import parse_duration
from dynflow.engines import (
    Engine,
    InstanceRef,
    Limits,
    Listener,
    NewFork,
    NewInstance,
    StepKey,
    StepRecord,
    Terminated,
)
from dynflow.engines.embedded import claims, forks, history, instances, rows, steps
from dynflow.engines.embedded.database import Synchronous
from dynflow.engines.embedded.scheduler import Scheduler
from dynflow.engines.embedded.storage import Storage
from dynflow.engines.embedded.whole import Calls, whole
from dynflow.engines.happened import ENDS, Happened
from dynflow.engines.registry import Registry, at_least_one, bind
from dynflow.engines.telling import Telling
from dynflow.engines.view import InstanceRow, end_of, history_events, instance_status, result_of
from dynflow.errors import InstanceNotFoundError, InvalidArgumentError
from dynflow.instance import FINISHED, may
from dynflow.segment import Segment
from dynflow.types import HistoryEvent, InstanceStatus, WorkflowEvent
from dynflow.workflow import WorkflowEntrypoint

_HISTORY_PAGE = 500


class EmbeddedEngine(Engine):
    """Durable workflows in one file. Use inside `async with`, after `register`.

    `path`: the SQLite file, created where missing. `synchronous="FULL"`: what was acknowledged survives power
    loss; `"NORMAL"`: a process crash only. `concurrency`: how many instances run at a time (waiting ones do not
    count). `tenant_key`: the metadata key, or a function of the metadata, that says whose an instance is.
    `retention`: how long an instance is kept after its end where `create` says nothing else.
    `tenant_concurrency`: how many instances of one tenant run at a time; the others queue.
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
        retention: Any = timedelta(days=30),
        tenant_concurrency: int | None = None,
    ) -> None:
        at_least_one(concurrency, "concurrency")
        if tenant_concurrency is not None:
            at_least_one(tenant_concurrency, "tenant_concurrency")
        if synchronous not in {"FULL", "NORMAL"}:
            raise InvalidArgumentError(f'synchronous must be "FULL" or "NORMAL", not {synchronous!r}')
        self.limits = limits or Limits()
        self.clock: Clock = clock or SystemClock()
        self._tenant_key = tenant_key
        self._keep = parse_duration(retention)
        self._storage = Storage(Path(path), synchronous)
        self._telling, self.calls = Telling(), Calls()
        self._registry = Registry(max_retries=self.limits.retries, concurrency=concurrency)
        self._scheduler = Scheduler(
            self._storage,
            self._telling,
            self.clock,
            self.limits,
            concurrency=concurrency,
            per_tenant=tenant_concurrency,
            keep=self._keep,
            make_segment=self._segment,
        )

    def _segment(self, event: WorkflowEvent, *args: Any, **options: Any) -> Segment:
        """Make what runs an instance; `dynflow.testing` makes its own."""
        return Segment(event, *args, **options)

    # --- setting up ---

    def register(
        self,
        name: str,
        entrypoint: type[WorkflowEntrypoint],
        *,
        env: Any = None,
        binding: str | None = None,
        step_defaults: Mapping[str, Any] | None = None,
        concurrency: int | None = None,
    ) -> None:
        """Make a workflow known: a class made by `create_dynamic_workflow_entrypoint`, or one of the host's own.

        `env` becomes `self.env` (a dict's items are attributes too). `binding`: under this name the loaders in
        `env` give tenants the workflow. `step_defaults`: a step config in place of the contract's defaults.
        `concurrency`: how many of its instances run at a time, where that is fewer than the engine's.
        """
        registered = self._registry.add(name, entrypoint, env, binding, step_defaults, concurrency)
        self._scheduler.register(name, registered)
        bind(self.binding(name), binding, env)

    def binding(self, name: str) -> WorkflowBinding:
        """Return the raw binding of a registered workflow: it reaches all tenants' instances."""
        self._registry.check(name)
        return WorkflowBinding(self, name, tenant=None, tenant_key=self._tenant_key)

    def add_listener(self, listener: Listener) -> None:
        """Call `listener(ref, event)` on the event loop after each history event is durable."""
        self._telling.add_listener(listener)

    async def __aenter__(self) -> Self:
        await self._storage.open()
        try:
            await self._scheduler.start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Stop: running attempts are cancelled and count as made; everything goes on at the next start."""
        writer = self._storage.refuse()
        if writer is not None:
            try:
                await self._scheduler.stop()
            finally:
                self._telling.close()
                await writer.close()
                await self.calls.ended()

    # --- Engine ---

    async def create(self, workflow: str, tenant: str, items: Sequence[NewInstance]) -> list[bool]:
        """Queue instances; False in the place of each whose id exists."""
        now, slots = self.clock.now_us(), self._scheduler.reserve(workflow, len(items))

        def told(created: list[claims.Created | None] | None, _error: BaseException | None) -> None:
            try:
                self._created(created or ())
            finally:
                self._scheduler.release(slots)

        try:
            # Told whatever becomes of the caller: what was claimed has to be started.
            write = self._storage.submit(
                lambda db: claims.create(db, workflow, tenant, items, now, slots=slots), told
            )
        except BaseException:
            self._scheduler.release(slots)
            raise
        return [made is not None for made in await write]

    def _created(self, created: Sequence[claims.Created | None]) -> None:
        is_queued = False
        for made in created:
            if made is None:  # its id exists
                continue
            self._telling.tell(made.ref, (made.happened,))
            if made.claim is not None:
                self._scheduler.start_now(made.claim)
            else:
                is_queued = True
        if is_queued:
            self._scheduler.pump()

    async def find(self, ref: InstanceRef) -> InstanceRef:
        """Return the reference with its tenant."""
        return (await self._storage.submit(lambda db: rows.find(db, ref))).ref

    async def status(self, ref: InstanceRef) -> InstanceStatus:
        """Return status, result and steps."""

        def read(db: Any) -> tuple[InstanceRow, list[tuple[Any, ...]], dict[int, list[tuple[Any, ...]]]]:
            row = rows.find(db, ref)
            return row, rows.load_steps(db, row.key), rows.load_attempts(db, row.key)

        row, step_rows, attempts = await self._storage.submit(read)
        return instance_status(row, rows.step_records(step_rows), attempts)

    @whole
    async def control(
        self, ref: InstanceRef, move: Literal["pause", "resume", "terminate"], *, rollback: bool = False
    ) -> None:
        """Pause, resume or terminate."""
        if move == "pause":
            await self._pause(ref)
        elif move == "resume":
            await self._resume(ref)
        else:
            await self._terminate(ref, rollback=rollback)

    async def _pause(self, ref: InstanceRef) -> None:
        now = self.clock.now_us()

        def write(db: Any) -> tuple[InstanceRow, Happened | None]:
            row = rows.find(db, ref)
            if not may("pause", row.status, row.id):
                return row, None
            return row, instances.pause(db, row.key, now, live=row.status == "running")

        row, happened = await self._storage.submit(write)
        segment = self._scheduler.segment(row.key)
        if row.status == "running" and segment is not None:
            segment.pause()
        self._telling.tell(row.ref, [happened])

    async def _resume(self, ref: InstanceRef) -> None:
        now = self.clock.now_us()

        def write(db: Any) -> tuple[InstanceRow, list[Happened | None], list[StepRecord]]:
            row = rows.find(db, ref)
            if not may("resume", row.status, row.id):
                return row, [], []
            happened = [instances.resume(db, row, now)]
            given = steps.deliver_buffered(db, row.key, now)
            return row, [*happened, *(event for _, event in given)], [waiter for waiter, _ in given]

        row, happened, waiters = await self._storage.submit(write)
        segment = self._scheduler.segment(row.key)
        if row.status == "waiting_for_pause" and segment is not None:
            segment.resume()
            for waiter in waiters:
                segment.deliver(waiter)
        self._telling.tell(row.ref, happened)
        self._scheduler.pump()

    async def _terminate(self, ref: InstanceRef, *, rollback: bool) -> None:
        now, end = self.clock.now_us(), Terminated(None)

        def write(db: Any) -> tuple[InstanceRow, Happened | None, int | None]:
            row = rows.find(db, ref)
            may("terminate", row.status, row.id)
            if not rollback or row.started_at is None:
                return row, *instances.finish(db, row.key, end, self._keep, now)
            if row.ending is not None:  # it is rolling back already
                return row, None, None
            return row, instances.begin_rollback(db, row, now), None

        row, happened, expires_at = await self._storage.submit(write)
        if happened is not None:
            self._telling.tell(row.ref, [happened])
            if expires_at is not None:
                self._telling.ended(row.ref, end)
            self._scheduler.arm(expires_at)
            await self._scheduler.abort(row.key)
            self._scheduler.pump()

    @whole
    async def restart(self, ref: InstanceRef, from_step: StepKey | None) -> None:
        """Start again, keeping what was started before `from_step`."""
        now = self.clock.now_us()

        def write(db: Any) -> tuple[InstanceRow, list[Happened]]:
            row = rows.find(db, ref)
            return row, instances.restart(db, row, from_step, now)

        row, happened = await self._storage.submit(write)
        self._telling.tell(row.ref, happened)
        await self._scheduler.abort(row.key)
        self._scheduler.pump()

    @whole
    async def fork(self, ref: InstanceRef, before: StepKey, new: NewFork) -> bool:
        """Queue another instance, with what `ref` had ended of the steps before `before`."""
        now = self.clock.now_us()
        forked = await self._storage.submit(lambda db: forks.fork(db, ref, before, new, now))
        if forked is not None:
            self._telling.tell(forked.ref, forked.happened)
            self._scheduler.pump()
        return forked is not None

    @whole
    async def send_event(self, ref: InstanceRef, event_type: str, payload: bytes) -> None:
        """Deliver or buffer an event."""
        now = self.clock.now_us()

        def write(db: Any) -> tuple[InstanceRow, StepRecord | None, Happened | None]:
            row = rows.find(db, ref)
            may("send_event", row.status, row.id)
            waiter, happened = steps.send_event(db, row, event_type, payload, now, self.limits.state)
            if waiter is not None and row.status == "waiting":
                claims.requeue(db, row.key)
            return row, waiter, happened

        row, waiter, happened = await self._storage.submit(write)
        if waiter is not None:
            segment = self._scheduler.segment(row.key)
            if segment is not None:
                segment.deliver(waiter)
            self._telling.tell(row.ref, [happened])
            self._scheduler.pump()

    @whole
    async def delete(self, refs: Sequence[InstanceRef]) -> list[bool]:
        """Delete instances with all they have."""

        def write(db: Any) -> list[InstanceRow | None]:
            return [instances.delete_found(db, ref) for ref in refs]

        deleted = await self._storage.submit(write)
        gone = [row for row in deleted if row is not None]
        for row in gone:
            self._telling.ended(row.ref, None)
        await asyncio.gather(*(self._scheduler.abort(row.key) for row in gone))
        return [row is not None for row in deleted]

    async def history(self, ref: InstanceRef, cursor: int) -> AsyncGenerator[HistoryEvent, None]:
        """Yield what happened after `cursor`, then what happens, up to the end of the instance."""
        ref = await self._full(ref)
        with self._telling.followed(ref) as follower:
            row = await self._storage.submit(lambda db: rows.find(db, ref))
            while True:
                found, status = await self._storage.submit(
                    lambda db, after=cursor: (  # type: ignore[misc]
                        history.load_history(db, row.key, after, _HISTORY_PAGE),
                        rows.status_of(db, row.key),
                    )
                )
                if not found and (status is None or status in FINISHED):
                    return
                is_live = not found
                new: list[Happened] | None = found
                while new is not None:
                    for event in history_events(new):
                        if event.event_id > cursor:
                            cursor = event.event_id
                            yield event
                    if not is_live or (new and new[-1].types[-1] in ENDS):
                        break
                    new = await follower.after(cursor)

    async def result(self, ref: InstanceRef) -> Any:
        """Wait for the end; return the output or raise the instance's error."""
        ref = await self._full(ref)
        end = self._telling.end_of(ref)
        try:
            if not self._scheduler.is_running(ref):
                row = await self._storage.submit(lambda db: rows.find(db, ref))
                if row.status in FINISHED:
                    return result_of(end_of(row), ref.id)
            how = await end
        finally:
            self._telling.forget(ref, end)
        if how is None:
            raise InstanceNotFoundError(f"instance {ref.id!r} was deleted before its end")
        return result_of(how, ref.id)

    async def _full(self, ref: InstanceRef) -> InstanceRef:
        return await self.find(ref) if ref.tenant is None else ref

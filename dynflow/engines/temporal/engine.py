"""The Temporal engine as its users see it: registration, the instance API, history and results."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal, Self

from temporalio.client import Client
from temporalio.common import SearchAttributeKey, SearchAttributePair, TypedSearchAttributes
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from dynflow.binding import WorkflowBinding
from dynflow.clock import MICROSECOND, Clock, SystemClock
from dynflow.durations import parse_duration
from dynflow.engines import (
    Completed,
    Engine,
    Failed,
    InstanceRef,
    Limits,
    Listener,
    NewFork,
    NewInstance,
    Outcome,
    StepKey,
    Terminated,
)
from dynflow.engines.happened import ENDS, Happened
from dynflow.engines.registry import Registry, at_least_one, bind
from dynflow.engines.telling import End, Telling
from dynflow.engines.temporal import moves
from dynflow.engines.temporal.activation import Workplace
from dynflow.engines.temporal.blobs import Aside, Blobs, is_reference
from dynflow.engines.temporal.book import Book, compact, plain_of
from dynflow.engines.temporal.host import Host
from dynflow.engines.temporal.interpreter import NAME, POST, Interpreter
from dynflow.engines.temporal.names import Names
from dynflow.engines.temporal.posting import Post
from dynflow.engines.temporal.reading import Reader
from dynflow.engines.temporal.room import Room
from dynflow.engines.temporal.search_attributes import (
    INSTANCE,
    STATUS,
    TENANT,
    WORKFLOW,
    missing_search_attributes,
)
from dynflow.engines.temporal.stored import ServerBlobs, delete_workflow
from dynflow.engines.temporal.views import FIRST_LOOK, Views
from dynflow.engines.temporal.wire import Wire, storage_error
from dynflow.errors import (
    EngineClosedError,
    IllegalMoveError,
    InstanceNotFoundError,
    InvalidArgumentError,
    StorageError,
    WorkflowInternalError,
)
from dynflow.instance import FINISHED, may
from dynflow.segment import Segment
from dynflow.serialization import encode
from dynflow.types import HistoryEvent, InstanceStatus, WorkflowEvent
from dynflow.workflow import WorkflowEntrypoint

# How many instances' workflows a worker keeps in memory.
_CACHED = 50
# How long a worker that has an instance in memory is waited for, before any other is asked.
_STICKY = timedelta(seconds=0.5)
# How long a worker may take for the interpreter's next move; one that died with it is noticed by that.
_TASK = timedelta(seconds=5)
# Books of more characters are kept aside.
_INLINE = 256_000


class TemporalEngine(Engine):
    """Durable workflows on a Temporal server. Use inside `async with`, after `register`.

    `client`: a connected client, see `connect`. `task_queue`: the name under which all processes of one installation
    work together; instances belong to it. `concurrency`: how many instances run at a time in this process.
    `heartbeat`: after how long without a sign a process that runs instances is taken for dead. `blobs`: where values
    of more than 32 KB are kept; the server itself where None. The rest is as for EmbeddedEngine.
    """

    def __init__(  # noqa: PLR0913 - keywords, each with a default
        self,
        client: Client,
        *,
        task_queue: str = "dynflow",
        clock: Clock | None = None,
        concurrency: int = 500,
        tenant_key: str | Callable[[Any], str] = "tenant_id",
        limits: Limits | None = None,
        retention: Any = timedelta(days=30),
        tenant_concurrency: int | None = None,
        heartbeat: Any = timedelta(seconds=10),
        blobs: Blobs | None = None,
    ) -> None:
        at_least_one(concurrency, "concurrency")
        if tenant_concurrency is not None:
            at_least_one(tenant_concurrency, "tenant_concurrency")
        self.limits, self.clock = limits or Limits(), clock or SystemClock()
        self._tenant_key, self._keep = tenant_key, parse_duration(retention) // MICROSECOND
        self._heartbeat = parse_duration(heartbeat).total_seconds()
        self._names = Names(task_queue)
        self._wire = Wire(client, task_queue)
        self._reader = Reader(self._wire)
        self._blobs = blobs or ServerBlobs(client, task_queue)
        self._telling = Telling()
        self._views = Views(
            self._reader, self._names, self._aside, self.clock, self._telling, self._check_open
        )
        self._registry = Registry(max_retries=self.limits.retries, concurrency=concurrency)
        room = Room(concurrency, tenant_concurrency, lambda workflow: self._registry[workflow].concurrency)
        self._office = Post(self._wire, self._reader, self.clock, self._told)
        self._host = Host(
            Workplace(
                self._wire, self._reader, self._registry, room, self.clock, self.limits, self._keep,
                self._heartbeat / 3, self._telling.tell, self._settled, self._aside, self._segment,
            )
        )  # fmt: skip
        self._worker: asyncio.Task[None] | None = None
        self._has_attributes = False

    def _segment(self, event: WorkflowEvent, *args: Any, **options: Any) -> Segment:
        return Segment(event, *args, **options)

    def _aside(self, workflow_id: str) -> Aside:
        return Aside(self._blobs, f"{workflow_id}/value")

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
        """Make a workflow known, as EmbeddedEngine.register does. Every process of a task queue registers the same."""
        self._registry.add(name, entrypoint, env, binding, step_defaults, concurrency)
        bind(self.binding(name), binding, env)

    def binding(self, name: str) -> WorkflowBinding:
        """Return the raw binding of a registered workflow: it reaches all tenants' instances."""
        self._registry.check(name)
        return WorkflowBinding(self, name, tenant=None, tenant_key=self._tenant_key)

    def add_listener(self, listener: Listener) -> None:
        """Call `listener(ref, event)` after each history event is durable that this process brings about."""
        self._telling.add_listener(listener)

    async def __aenter__(self) -> Self:
        with contextlib.suppress(StorageError):
            self._has_attributes = not await missing_search_attributes(self._wire.client)
        worker = Worker(
            self._wire.client,
            task_queue=self._wire.queue,
            workflows=[Interpreter],
            workflow_runner=UnsandboxedWorkflowRunner(),
            max_cached_workflows=_CACHED,
            max_concurrent_workflow_tasks=_CACHED,
            sticky_queue_schedule_to_start_timeout=_STICKY,
            debug_mode=True,  # takes no slow machine for a deadlock: this workflow is ours alone
            nonsticky_to_sticky_poll_ratio=0.5,
        )
        self._worker = asyncio.get_running_loop().create_task(worker.run())
        self._host.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Stop: running attempts are cancelled and count as made; instances go on where somebody takes them."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        await self._host.stop()
        self._telling.close()
        await self._office.close()
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker

    # --- Engine ---

    async def create(self, workflow: str, tenant: str, items: Sequence[NewInstance]) -> list[bool]:
        """Queue instances; False in the place of each whose id exists."""
        self._check_open()
        once = {item.id: item for item in reversed(items)}  # of two with one id the first is created
        made = await asyncio.gather(*(self._create(workflow, tenant, item) for item in once.values()))
        created = dict(zip(once, made, strict=True))
        return [created.pop(item.id, False) for item in items]

    async def _create(self, workflow: str, tenant: str, item: NewInstance) -> bool:
        aside = self._aside(self._names.workflow_id(InstanceRef(workflow, item.id, tenant)))
        book = Book(
            workflow, item.id, tenant,
            await aside.put(item.params) or "{}",
            self.clock.now_us(),
            await aside.put(item.schedule),
            None if item.retention is None else encode(dict(item.retention)).decode(),
        )  # fmt: skip
        return await self._start(book)

    async def _start(self, book: Book) -> bool:
        ref = InstanceRef(book.workflow, book.id, book.tenant)
        workflow_id = self._names.workflow_id(ref)
        options = {
            "clock": "server" if isinstance(self.clock, SystemClock) else "host",
            "heartbeat": self._heartbeat,
            "attributes": self._has_attributes,
        }
        start: dict[str, Any] = {"options": options, "book": plain_of(book)}
        text = compact(start["book"])
        if len(text) > _INLINE:
            start |= {"shelf": await self._aside(workflow_id).shelve(text), "book": None}
        try:
            await self._wire.client.start_workflow(
                NAME,
                compact(start).encode(),
                id=workflow_id,
                task_queue=self._wire.queue,
                memo={"tenant": book.tenant},
                task_timeout=_TASK,
                search_attributes=self._attributes_of(ref),
            )
        except WorkflowAlreadyStartedError:
            return False
        except RPCError as error:
            raise storage_error(error) from error
        self._names.note(ref)
        self._telling.tell(ref, book.history(0))
        return True

    def _attributes_of(self, ref: InstanceRef) -> TypedSearchAttributes:
        """Return what people look for instances by, where the server knows these attributes."""
        found = {
            WORKFLOW: ref.workflow,
            INSTANCE: ref.id,
            TENANT: ref.tenant or "",
            STATUS: "open",
        }
        return TypedSearchAttributes(
            [
                SearchAttributePair(SearchAttributeKey.for_keyword(name), value)
                for name, value in found.items()
            ]
            if self._has_attributes
            else []
        )

    async def find(self, ref: InstanceRef) -> InstanceRef:
        """Return the reference with its tenant."""
        self._check_open()
        if ref.tenant is not None:
            if await self._reader.exists(self._names.workflow_id(ref)):
                return ref
        else:
            found = await self._names.tenants(ref, self._wire.client, self._reader.exists)
            if len(found) == 1:
                return ref._replace(tenant=found[0])
            if found:
                raise InvalidArgumentError(f"several tenants have an instance {ref.id!r}: name the tenant")
        raise InstanceNotFoundError(f"there is no instance {ref.id!r} of workflow {ref.workflow!r}")

    async def status(self, ref: InstanceRef) -> InstanceStatus:
        """Return status, result and steps."""
        return await self._views.status(await self._full(ref))

    async def history(self, ref: InstanceRef, cursor: int) -> AsyncGenerator[HistoryEvent, None]:
        """Yield what happened after `cursor`, then what happens, up to the end of the instance."""
        async with contextlib.aclosing(self._views.history(await self._full(ref), cursor)) as events:
            async for event in events:
                yield event

    async def result(self, ref: InstanceRef) -> Any:
        """Wait for the end; return the output or raise the instance's error."""
        return await self._views.result(await self._full(ref))

    async def control(
        self, ref: InstanceRef, move: Literal["pause", "resume", "terminate"], *, rollback: bool = False
    ) -> None:
        """Pause, resume or terminate."""
        mail: dict[str, Any] = {"op": move}
        if move == "terminate":
            mail |= {"rollback": rollback, "keep": self._keep}
        how = await self._post(await self._full(ref), mail)
        if how in FINISHED:
            may(move, how, ref.id)
        if move == "pause":
            await self._until_paused(self._names.workflow_id(ref))

    async def _until_paused(self, workflow_id: str) -> None:
        """Return when the pause of an instance that has not begun to run has taken effect."""
        active = self._host.active.get(workflow_id)
        if active is not None and not active.has_begun:
            await active.over.wait()
        while await self._reader.is_queued(workflow_id):  # noqa: ASYNC110 - only the server knows
            await asyncio.sleep(FIRST_LOOK)

    async def restart(self, ref: InstanceRef, from_step: StepKey | None) -> None:
        """Start again, keeping what was started before `from_step`."""
        ref = await self._full(ref)
        first = 0 if from_step is None else moves.started_as(await self._views.book(ref), from_step)
        await self._post(ref, {"op": "restart", "first": first})

    async def fork(self, ref: InstanceRef, before: StepKey, new: NewFork) -> bool:
        """Queue another instance, with what `ref` had ended of the steps before `before`."""
        book = await self._views.book(ref)
        workflow_id = self._names.workflow_id(InstanceRef(ref.workflow, new.id, book.tenant))
        source, target = self._aside(self._names.workflow_id(ref)), self._aside(workflow_id)
        params = await source.get(book.params) if new.params is None else new.params
        retention = None if new.retention is None else encode(dict(new.retention)).decode()
        forked = moves.fork(
            book, before, new, await target.put(params) or "{}", retention, self.clock.now_us()
        )
        for line in forked.lines.values():  # values that are kept for another instance go with it
            if line.record.output is not None and is_reference(line.record.output.decode()):
                moved = await target.put(await source.get(line.record.output.decode()))
                line.record.output = _bytes(moved)
        return await self._start(forked)

    async def send_event(self, ref: InstanceRef, event_type: str, payload: bytes) -> None:
        """Deliver or buffer an event."""
        ref = await self._full(ref)
        kept = await self._aside(self._names.workflow_id(ref)).put(payload)
        mail = {"op": "event", "type": event_type, "payload": kept, "limit": self.limits.state}
        workflow_id = self._names.workflow_id(ref)
        how = await self._office.send_event(ref, workflow_id, mail, len(payload))
        if how == moves.FULL:
            raise WorkflowInternalError(
                f"instance {ref.id!r} takes no more events: its state has reached the limit of"
                f" {self.limits.state:,} bytes"
            )
        if how != moves.OK:
            raise IllegalMoveError(
                f"instance {ref.id!r} is {how}: send_event is possible only before the end"
            )

    async def delete(self, refs: Sequence[InstanceRef]) -> list[bool]:
        """Delete instances with all they have."""
        once = list(dict.fromkeys(refs))
        deleted = dict(zip(once, await asyncio.gather(*(self._delete(ref) for ref in once)), strict=True))
        return [deleted.pop(ref, False) for ref in refs]

    async def _delete(self, ref: InstanceRef) -> bool:
        try:
            ref = await self._full(ref)
            book = await self._views.book(ref)
        except InstanceNotFoundError:
            return False
        workflow_id = self._names.workflow_id(ref)
        mail = {"op": "delete", "uid": os.urandom(12).hex(), "at": self.clock.now_us()}
        if not await self._wire.signal(workflow_id, POST, mail):
            return False
        while await self._reader.exists(workflow_id):  # noqa: ASYNC110 - only the server knows
            await asyncio.sleep(FIRST_LOOK)
        self._names.forget(ref)
        await self._release(workflow_id)
        self._telling.ended(ref, None)
        await self._aside(workflow_id).delete(book.references())
        await delete_workflow(self._wire.client, workflow_id)
        return True

    # --- inside ---

    async def _full(self, ref: InstanceRef) -> InstanceRef:
        self._check_open()
        return await self.find(ref) if ref.tenant is None else ref

    def _check_open(self) -> None:
        if self._worker is None:
            raise EngineClosedError("the engine is not open: use it inside `async with`")

    async def _post(self, ref: InstanceRef, mail: dict[str, Any]) -> str:
        """Send mail, and return what became of it, once it is handled."""
        self._check_open()
        workflow_id = self._names.workflow_id(ref)
        handled = await self._office.send(ref, workflow_id, mail)
        active = self._host.active.get(workflow_id)
        if active is not None:
            active.lease.listen()
        how = await handled
        if active is not None and mail["op"] in {"terminate", "restart"}:
            await active.over.wait()
        return how

    async def _told(
        self, ref: InstanceRef, happened: list[Happened], status: str, look_at: int | None, end: End | None
    ) -> None:
        """Tell what happened by mail, or by a segment's end; `end`: how the instance ended, if that is known."""
        self._telling.tell(ref, happened)
        workflow_id = self._names.workflow_id(ref)
        if look_at is not None and not isinstance(self.clock, SystemClock):
            self.clock.call_at(look_at, partial(self._office.wake, workflow_id, look_at))
        if status in FINISHED and happened and happened[-1].types[-1] in ENDS:
            with contextlib.suppress(InstanceNotFoundError):
                self._telling.ended(ref, end or await self._views.end(ref))

    async def _settled(self, ref: InstanceRef, workflow_id: str, uid: str, outcome: Outcome | None) -> None:
        end = outcome if isinstance(outcome, (Completed, Failed, Terminated)) else None
        with contextlib.suppress(InstanceNotFoundError, StorageError):
            await self._office.ask(ref, workflow_id, uid, end)

    async def _release(self, workflow_id: str) -> None:
        active = self._host.active.get(workflow_id)
        if active is not None:
            active.lease.listen()
            await active.over.wait()


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode()

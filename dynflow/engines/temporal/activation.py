"""One segment in this process, from the moment it was taken from the queue to the answer how it ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from temporalio.api.workflowservice.v1 import PollActivityTaskQueueResponse

from dynflow.clock import Clock, to_datetime
from dynflow.engines import (
    Blocked,
    Completed,
    Failed,
    InstanceRef,
    Interrupted,
    Limits,
    Outcome,
    Terminated,
)
from dynflow.engines.happened import Happened
from dynflow.engines.registry import Registry
from dynflow.engines.temporal.blobs import Aside
from dynflow.engines.temporal.book import Book, Letter, failure_text, load
from dynflow.engines.temporal.journal import TemporalJournal
from dynflow.engines.temporal.lease import Lease, Mail
from dynflow.engines.temporal.reading import Reader
from dynflow.engines.temporal.room import Room
from dynflow.engines.temporal.wire import Wire
from dynflow.errors import (
    EngineClosedError,
    IsolateCrashedError,
    LeaseLostError,
    StorageError,
    WorkflowInternalError,
)
from dynflow.failure import Failure
from dynflow.segment import Segment
from dynflow.serialization import decode, encode
from dynflow.types import WorkflowEvent

# An isolate that goes down by itself is tried again this often before the instance fails with it.
_MOST_CRASHES = 3
# How long a segment that is handed over may wait until that is noted, in seconds.
_HANDED_OVER = 2.0
_CRASHED = f"{IsolateCrashedError.__module__}:{IsolateCrashedError.__qualname__}"


@dataclass(frozen=True, slots=True)
class Workplace:
    """What segments need of their process and engine. `keep`: microseconds; `beat_every`: seconds.

    `crashes`: how often the isolates of instances went down by themselves.
    """

    wire: Wire
    reader: Reader
    registry: Registry
    room: Room
    clock: Clock
    limits: Limits
    keep: int
    beat_every: float
    tell: Callable[[InstanceRef, Sequence[Happened]], None]
    settled: Callable[[InstanceRef, str, str, Outcome | None], Awaitable[None]]
    aside: Callable[[str], Aside]
    make_segment: Callable[..., Segment]
    crashes: dict[str, int] = field(default_factory=dict)


class Activation:
    """One segment in this process, from the moment it was taken from the queue."""

    def __init__(
        self,
        place: Workplace,
        task: PollActivityTaskQueueResponse,
        asked: dict[str, Any],
        entered: Callable[[], None],
    ) -> None:
        self._place, self._task, self._asked, self._entered = place, task, asked, entered
        named = asked.get("book", asked)
        self.ref = InstanceRef(named["workflow"], named["id"], named["tenant"])
        self.lease = Lease(
            place.wire, task, self._place.beat_every, asked["mail"], self._read_mail, self._lost
        )
        self.workflow_id = self.lease.workflow_id
        self.guest: Any = None
        self.over = asyncio.Event()
        self._book: Book
        self._journal: TemporalJournal
        self._segment: Segment | None = None
        self._ended = asyncio.Event()  # before it began: paused, taken away, lost, or sent back
        self._is_lost = self._is_busy = self._is_pausing = False
        self._early: list[Mail] = []
        self._tasks: set[asyncio.Task[None]] = set()

    # --- the course of it ---

    async def run(self) -> None:
        """Run the segment once there is a slot for it, and say how it ended."""
        try:
            await self._prepare()
            if self.ref.workflow not in self._place.registry.names():  # until somebody registers it
                self.send_back()
                await self._finish(None)
                return
            self.guest = self._place.room.enter(
                self.ref.workflow, self.ref.tenant or "", is_new=self._book.started_at is None
            )
            self._entered()
            await self._wait_for_turn()
            outcome = await self._outcome() if not self._ended.is_set() else None
            await self._finish(outcome)
        except (LeaseLostError, EngineClosedError):
            pass  # whoever has it now says what becomes of it
        except asyncio.CancelledError:
            await self._hand_over()
            raise
        except Exception as error:  # noqa: BLE001 - the door around a segment (architecture.md section 6)
            await self._give_back(f"the worker failed: {error!r:.300}")
        finally:
            await self.lease.close()
            for task in self._tasks:
                task.cancel()
            if self.guest is not None:
                self._place.room.leave(self.guest)
            self.over.set()

    async def _prepare(self) -> None:
        """Read the book."""
        self._book = load(self._asked.get("book") or await self._place.reader.text(self.workflow_id))
        for mail in self._early:
            self._read_mail(mail)
        self._early.clear()
        self.lease.begin(self._book.entries)
        self._journal = TemporalJournal(
            self._book, self.lease, self._place.aside(self.workflow_id),
            self._place.clock, self._place.limits, self._tell,
        )  # fmt: skip

    async def _wait_for_turn(self) -> None:
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({self.guest.turn, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()

    async def _outcome(self) -> Outcome | None:
        entry = ["claim", self._place.clock.now_us()]
        happened = self._book.apply(entry)
        claimed = self.lease.record(entry, soon=True)  # most segments record something else at once
        claimed.add_done_callback(
            lambda done: None if done.cancelled() or done.exception() is not None else self._tell(happened)
        )
        registered = self._place.registry[self.ref.workflow]
        try:
            await self._journal.read()
            event = await self._event()
        except ValueError as error:  # stored values of a class that this release of the host does not know
            return Failed(
                Failure.of(WorkflowInternalError(f"the instance's journal cannot be read: {error}"))
            )
        if self._ended.is_set():
            return None
        segment = self._segment = self._place.make_segment(
            event, self._journal, self._place.clock, self._place.limits, registered.step_defaults,
            terminated=self._book.ending is not None,
        )  # fmt: skip
        if self._is_pausing:
            segment.pause()
        try:
            return await segment.run(registered.main)
        except LeaseLostError:
            if self._is_lost:
                raise
            return None
        finally:
            self._segment = None

    async def _event(self) -> WorkflowEvent:
        book, aside = self._book, self._place.aside(self.workflow_id)
        params, schedule = await aside.get(book.params), await aside.get(book.schedule)
        return WorkflowEvent(
            decode(params or b"{}"),
            to_datetime(book.created_at),
            book.id,
            book.workflow,
            None if schedule is None else decode(schedule),
        )

    async def _finish(self, outcome: Outcome | None, *, wait: bool = False) -> None:
        if self._is_lost:
            return
        outcome = self._judge_crash(outcome)
        uid = f"segment {self._book.entries}.{self._book.events}"
        plain = await self._plain(outcome)
        await self.lease.complete(plain, uid, self._place.clock.now_us())
        if self.guest is not None:
            self._place.room.leave(self.guest)
            self.guest = None
        if outcome is not None or wait or self._is_pausing:
            await self._place.settled(self.ref, self.workflow_id, uid, outcome)

    async def _plain(self, outcome: Outcome | None) -> dict[str, Any]:
        aside, keep = self._place.aside(self.workflow_id), self._place.keep
        match outcome:
            case Completed(output):
                return {"kind": "completed", "output": await aside.put(output), "keep": keep}
            case Failed(failure, rollback):
                return {
                    "kind": "failed",
                    "failure": failure_text(failure),
                    "rollback": _text(rollback),
                    "keep": keep,
                }
            case Terminated(rollback):
                return {"kind": "terminated", "rollback": _text(rollback), "keep": keep}
            case Blocked(waits, wake_at):
                return {"kind": "blocked", "waits": list(waits), "wake_at": wake_at}
            case None:
                return {"kind": "busy" if self._is_busy else "lost"}
        return {"kind": "interrupted"}

    def _judge_crash(self, outcome: Outcome | None) -> Outcome | None:
        crashes = self._place.crashes
        if isinstance(outcome, Failed) and outcome.failure.type == _CRASHED:
            count = crashes.get(self.workflow_id, 0) + 1
            if count < _MOST_CRASHES:
                crashes[self.workflow_id] = count
                return Interrupted()
        if isinstance(outcome, (Completed, Failed, Terminated, Blocked)):
            crashes.pop(self.workflow_id, None)
        return outcome

    async def _hand_over(self) -> None:
        """End the segment as it is; another one goes on. What ran is cut off, with which a pause has taken effect."""
        if not self.lease.has_begun:
            await self._give_back("the worker is shutting down")
        elif not self._is_lost:
            await self.lease.close()
            with contextlib.suppress(LeaseLostError, StorageError, TimeoutError):
                async with asyncio.timeout(_HANDED_OVER):
                    await self._finish(None, wait=True)

    async def _give_back(self, why: str) -> None:
        await self.lease.close()
        if not self._is_lost:
            await self.lease.give_back(why)

    def _tell(self, happened: Sequence[Happened]) -> None:
        self._place.tell(self.ref, happened)

    # --- news ---

    @property
    def has_begun(self) -> bool:
        """Whether the instance's code has been started, or is about to be."""
        return self.guest is None or self.guest.turn.done()

    def send_back(self) -> None:
        """Come again later."""
        self._is_busy = True
        self._ended.set()

    def _lost(self) -> None:
        self._is_lost = True
        self._end()

    def _end(self) -> None:
        self._ended.set()
        if self._segment is not None:
            self._segment.abort()

    def _read_mail(self, mail: Mail) -> None:
        if not hasattr(self, "_book"):
            self._early.append(mail)
            return
        match mail["op"]:
            case "event" if not self._ended.is_set():  # else it belongs to the next segment
                if not self._book.has_had(mail["uid"]):  # a book that was asked for late has it
                    self._book.receive(Letter(mail["uid"], mail["type"], mail["payload"], mail["at"]))
                    self._deliver()
            case "pause":
                self._pause()
            case "resume":
                self._resume()
            case "terminate" if mail["rollback"] and self._book.ending is not None:
                pass
            case "terminate" | "restart":
                self._is_pausing = False
                self._end()

    def _pause(self) -> None:
        self._is_pausing, self._book.status = True, "waiting_for_pause"
        if self._segment is None:
            self._ended.set()
        else:
            self._segment.pause()

    def _resume(self) -> None:
        self._is_pausing = False
        self._book.status = "running"
        if self._segment is not None:
            self._segment.resume()
            self._deliver()

    def _deliver(self) -> None:
        if self._segment is not None and not self._is_pausing and self._book.inbox:
            task = asyncio.get_running_loop().create_task(self._deliver_all(self._segment))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _deliver_all(self, segment: Segment) -> None:
        try:
            for waiter in await self._journal.deliver():
                segment.deliver(waiter)
        except (LeaseLostError, StorageError):
            self._end()


def _text(rollback: Any) -> str | None:
    return None if rollback is None else encode(rollback).decode()

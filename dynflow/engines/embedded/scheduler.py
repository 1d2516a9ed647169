"""Which instances run now: claims queued ones, runs their segments, stores how those ended, wakes who is due."""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from dynflow.clock import MICROSECOND, Clock, TimerHandle, to_datetime
from dynflow.engines import Blocked, Completed, Failed, InstanceRef, Interrupted, Limits, Outcome, Terminated
from dynflow.engines.embedded import claims, instances
from dynflow.engines.embedded.claims import Claim, Room
from dynflow.engines.embedded.journal import EmbeddedJournal
from dynflow.engines.embedded.rows import step_records
from dynflow.engines.embedded.storage import Storage
from dynflow.engines.registry import Registered
from dynflow.engines.telling import Telling
from dynflow.errors import (
    EngineClosedError,
    IsolateCrashedError,
    LeaseLostError,
    StorageError,
    WorkflowInternalError,
)
from dynflow.failure import Failure
from dynflow.segment import Main, Segment
from dynflow.serialization import decode
from dynflow.types import WorkflowEvent

# An isolate that goes down by itself is tried again this often before the instance fails with it.
_MOST_CRASHES = 3
# How many instances one transaction claims: its other callers wait no longer than that takes.
_CLAIMED_AT_ONCE = 200
# After storage failed, it is tried again this much later, for as long as it takes.
_STORAGE_RETRY = timedelta(seconds=1)
_CRASHED = f"{IsolateCrashedError.__module__}:{IsolateCrashedError.__qualname__}"


MakeSegment = Callable[..., Segment]
"""What takes the arguments of Segment and makes one."""


@dataclass(slots=True, eq=False)
class _Live:
    """An instance that runs here."""

    segment: Segment
    task: asyncio.Task[None]
    ref: InstanceRef


class Scheduler:
    """Runs segments on the engine's event loop, at most `concurrency` at a time."""

    def __init__(
        self,
        storage: Storage,
        telling: Telling,
        clock: Clock,
        limits: Limits,
        *,
        concurrency: int,
        per_tenant: int | None,
        keep: timedelta,
        make_segment: MakeSegment,
    ) -> None:
        self._storage, self._telling, self._clock, self._limits = storage, telling, clock, limits
        self._concurrency, self._per_tenant, self._keep = concurrency, per_tenant, keep
        self._new_segment = make_segment
        self._registered: dict[str, Registered] = {}
        self._live: dict[int, _Live] = {}
        self._live_by_ref: dict[InstanceRef, _Live] = {}
        self._reserved = 0
        self._running: Counter[str] = Counter()
        self._tenants: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._crashes: dict[int, int] = {}
        self._claiming = self._more_queued = False
        self._context = contextvars.Context()
        self._timer: TimerHandle | None = None
        self._timer_at: int | None = None

    def register(self, name: str, registered: Registered) -> None:
        """Run instances of this workflow from now on."""
        self._registered[name] = registered
        self.pump()

    async def start(self) -> None:
        """Go on with what a process that is gone was running, and with what is due."""
        self._context = contextvars.copy_context()
        now = self._clock.now_us()

        paused, next_wake = await self._storage.submit(
            lambda db: (claims.recover(db, now), instances.next_wake(db))
        )
        for ref, happened in paused:
            self._telling.tell(ref, (happened,))
        self.arm(next_wake)
        self.pump()

    async def stop(self) -> None:
        """Cancel what runs; the storage must have been closed to it before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._timer_at = None
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        # One that was cancelled before it began has not put away what is its own.
        self._live.clear()
        self._live_by_ref.clear()
        self._running.clear()
        self._tenants.clear()
        self._tasks.clear()
        self._claiming = self._more_queued = False

    def segment(self, key: int) -> Segment | None:
        """Return the segment of an instance that runs here."""
        live = self._live.get(key)
        return None if live is None else live.segment

    async def abort(self, key: int) -> None:
        """End the segment of an instance that was taken from it; returns when nothing of it is left."""
        self._crashes.pop(key, None)
        live = self._live.get(key)
        if live is not None:
            live.segment.abort()
            await asyncio.wait([live.task])

    def is_running(self, ref: InstanceRef) -> bool:
        """Whether the instance runs here, and whoever waits for its end from now on will be told of it."""
        live = self._live_by_ref.get(ref)
        return live is not None and not live.segment.is_over

    # --- claiming ---

    def reserve(self, workflow: str, wanted: int) -> int:
        """Reserve slots for instances to be started by `start_now`; none where more than the slots in all counts."""
        registered = self._registered[workflow]
        if self._per_tenant is not None or registered.concurrency < self._concurrency:
            return 0
        slots = max(0, min(wanted, self._free()))
        self._reserved += slots
        return slots

    def release(self, slots: int) -> None:
        """Give reserved slots back, those that were used too: what was started is counted by itself."""
        self._reserved -= slots
        if slots and self._more_queued:  # somebody may have found no slot on their account
            self.pump()

    def start_now(self, claimed: Claim) -> None:
        """Start an instance that was claimed as it was created."""
        if self._storage.is_open:  # else it goes on at the next start
            self._telling.tell(claimed.ref, (claimed.happened,))
            self._start(claimed)

    def _free(self) -> int:
        return self._concurrency - len(self._live) - self._reserved

    def pump(self) -> None:
        """Claim as many queued instances as there are free slots."""
        if not self._storage.is_open:
            return
        if self._claiming:
            self._more_queued = True
            return
        slots = min(self._free(), _CLAIMED_AT_ONCE)
        if slots <= 0:
            self._more_queued = True
            return
        self._claiming, self._more_queued = True, False
        self._reserved += slots
        now, room = self._clock.now_us(), self._room(slots)
        claim = self._storage.submit(lambda db: claims.claim(db, room(), now))
        claim.add_done_callback(partial(self._claimed, slots))

    def _room(self, slots: int) -> Callable[[], Room]:
        """Return what makes the room: an operation may run twice, and using room up is not undone."""
        workflows = {
            name: registered.concurrency - self._running[name]
            for name, registered in self._registered.items()
        }
        tenants = Counter(self._tenants) if self._per_tenant is not None else Counter[str]()
        return lambda: Room(slots, dict(workflows), Counter(tenants), self._per_tenant)

    def _claimed(self, slots: int, claim: asyncio.Future[list[Claim]]) -> None:
        self._claiming = False
        self._reserved -= slots
        if not self._storage.is_open or claim.cancelled():
            return
        if claim.exception() is not None:
            self._later(self.pump)
            return
        for claimed in claim.result():
            self.start_now(claimed)
        if claim.result() or self._more_queued:
            self.pump()

    def _start(self, claimed: Claim) -> None:
        key, ref = claimed.lease.key, claimed.ref
        registered, before = self._registered[ref.workflow], self._live.get(key)
        loop = asyncio.get_running_loop()
        try:
            segment = self._make_segment(claimed, registered)
        except ValueError as error:  # stored values of a class that this release of the host does not know
            failure = Failure.of(WorkflowInternalError(f"the instance's journal cannot be read: {error}"))
            task = loop.create_task(self._settle(claimed, Failed(failure)))
            task.add_done_callback(self._tasks.discard)
        else:
            self._running[ref.workflow] += 1
            self._tenants[ref.tenant or ""] += 1
            # Not in the context of whoever made or woke it, who may be a step of another tenant.
            context = self._context.copy()
            task = loop.create_task(self._run(claimed, segment, registered.main, before), context=context)
            self._live[key] = self._live_by_ref[ref] = _Live(segment, task, ref)
        self._tasks.add(task)

    def _make_segment(self, claimed: Claim, registered: Registered) -> Segment:
        event = WorkflowEvent(
            decode(claimed.params),
            to_datetime(claimed.created_at),
            claimed.ref.id,
            claimed.ref.workflow,
            None if claimed.schedule is None else decode(claimed.schedule),
        )
        records = step_records(claimed.step_rows)
        journal = EmbeddedJournal(
            self._storage, self._telling, self._clock, self._limits, claimed.ref, claimed.lease, records
        )
        return self._new_segment(
            event,
            journal,
            self._clock,
            self._limits,
            registered.step_defaults,
            terminated=claimed.ending is not None,
        )

    # --- running ---

    async def _run(self, claimed: Claim, segment: Segment, main: Main, before: _Live | None) -> None:
        key, ref = claimed.lease.key, claimed.ref
        try:
            if before is not None:  # the segment that this instance was taken from is still ending
                await asyncio.wait([before.task])
            outcome = await self._outcome(segment, main)
            if outcome is not None:
                await self._settle(claimed, outcome)
        finally:
            self._running[ref.workflow] -= 1
            self._tenants[ref.tenant or ""] -= 1
            if not self._tenants[ref.tenant or ""]:
                del self._tenants[ref.tenant or ""]
            live = self._live.get(key)
            if live is not None and live.segment is segment:
                del self._live[key]
                self._live_by_ref.pop(ref, None)
            self._tasks.discard(asyncio.current_task())
            self.pump()

    async def _outcome(self, segment: Segment, main: Main) -> Outcome | None:
        try:
            return await segment.run(main)
        except (LeaseLostError, EngineClosedError):
            return None  # whoever took the instance has said what becomes of it
        except StorageError:
            return Interrupted()
        except Exception as error:  # noqa: BLE001 - the door around a segment (architecture.md section 6)
            return Failed(Failure.of(WorkflowInternalError(f"the engine failed: {error!r}")))

    async def _settle(self, claimed: Claim, outcome: Outcome) -> None:
        """Store how a segment ended, however long storage takes."""
        outcome = self._judge_crash(claimed.lease.key, outcome)
        while True:
            now = self._clock.now_us()
            try:
                happened, look_at = await self._storage.submit(
                    lambda db, outcome=outcome, now=now: instances.settle(  # type: ignore[misc]
                        db, claimed.lease, outcome, self._keep, now
                    )
                )
            except (LeaseLostError, EngineClosedError):
                return
            except WorkflowInternalError as error:  # its history is full: the end has a number kept for it
                outcome = Failed(Failure.of(error))
            except StorageError:
                again = asyncio.Event()
                self._later(again.set)
                await again.wait()
            else:
                self._telling.tell(claimed.ref, (happened,))
                if isinstance(outcome, (Completed, Failed, Terminated)):
                    self._telling.ended(claimed.ref, outcome)
                self.arm(look_at)
                return

    def _judge_crash(self, key: int, outcome: Outcome) -> Outcome:
        if isinstance(outcome, Failed) and outcome.failure.type == _CRASHED:
            crashes = self._crashes.get(key, 0) + 1
            if crashes < _MOST_CRASHES:
                self._crashes[key] = crashes
                return Interrupted()
        if isinstance(outcome, (Completed, Failed, Terminated, Blocked)):
            self._crashes.pop(key, None)
        return outcome

    # --- waking ---

    def arm(self, look_at: int | None) -> None:
        """Make the timer fire no later than `look_at`."""
        if look_at is None or not self._storage.is_open:
            return
        if self._timer_at is not None and self._timer_at <= look_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = look_at
        self._timer = self._clock.call_at(look_at, self._wake)

    def _wake(self) -> None:
        self._timer = self._timer_at = None
        if not self._storage.is_open:
            return
        now = self._clock.now_us()
        woken = self._storage.submit(lambda db: instances.wake_due(db, now))
        woken.add_done_callback(self._woken)

    def _woken(self, woken: asyncio.Future[int | None]) -> None:
        if not self._storage.is_open or woken.cancelled():
            return
        if woken.exception() is not None:
            self._later(self._wake)
            return
        self.arm(woken.result())
        self.pump()

    def _later(self, callback: Callable[[], None]) -> None:
        self._clock.call_later(_STORAGE_RETRY // MICROSECOND, callback)

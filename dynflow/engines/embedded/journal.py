"""The embedded engine's journal: every record is fenced by the lease, and told after its commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from dynflow.clock import Clock
from dynflow.engines import InstanceRef, Journal, Limits, StepKey, StepRecord, Told, shown_name
from dynflow.engines.embedded import instances, steps
from dynflow.engines.embedded.connection import Connection
from dynflow.engines.embedded.leases import Lease
from dynflow.engines.embedded.storage import Storage
from dynflow.engines.embedded.writer import Job, Operation
from dynflow.engines.happened import Happened, attempt_started, step_ended
from dynflow.engines.telling import Telling
from dynflow.errors import WorkflowTimeoutError
from dynflow.failure import Failure


class _Recording(Job):
    """What every step records; `_happened` makes what is told of it, with its number."""

    __slots__ = ("_journal", "_record", "_told")
    _happened: Callable[[StepRecord, int], Happened]

    def __init__(self, journal: EmbeddedJournal, record: StepRecord, told: Told) -> None:
        self._journal, self._record, self._told = journal, record, told
        self.error = None

    def tell(self) -> None:
        error = self.error
        if error is None and self._journal.is_heard:
            self._journal.tell((self._happened(self._record, self.result),))
        self._told(error)


class _Begin(_Recording):
    __slots__ = ()
    _happened = staticmethod(attempt_started)

    def run(self, db: Connection) -> int:
        journal = self._journal
        return steps.begin_attempt(db, journal.lease, self._record, journal.state_limit)


class _Finish(_Recording):
    __slots__ = ()
    _happened = staticmethod(step_ended)

    def run(self, db: Connection) -> int:
        return steps.finish_step(db, self._journal.lease, self._record)


class EmbeddedJournal(Journal):
    """The journal of one segment."""

    def __init__(
        self,
        storage: Storage,
        telling: Telling,
        clock: Clock,
        limits: Limits,
        ref: InstanceRef,
        lease: Lease,
        records: dict[StepKey, StepRecord],
    ) -> None:
        self.steps = records
        self._storage, self._telling, self._clock = storage, telling, clock
        self._ref, self.lease = ref, lease
        self.state_limit = limits.state

    def begin_attempt(self, record: StepRecord, told: Told) -> None:
        """Store that an attempt starts."""
        self._storage.put(_Begin(self, record, told))

    def finish_step(self, record: StepRecord, told: Told) -> None:
        """Store a step's final state."""
        self._storage.put(_Finish(self, record, told))

    async def delay_retry(self, record: StepRecord) -> None:
        """Store a failed attempt."""
        await self._write(lambda db: [steps.delay_retry(db, self.lease, record)])

    async def begin_wait(self, record: StepRecord) -> None:
        """Store a sleep or a wait."""
        lease, limit = self.lease, self.state_limit
        await self._write(lambda db: steps.begin_wait(db, lease, record, limit))

    async def end_wait(self, record: StepRecord) -> None:
        """End a wait whose deadline has passed."""
        timed_out = Failure.of(
            WorkflowTimeoutError(
                f"wait_for_event {shown_name(record.name)!r}: no event of type {record.event_type!r} came in time"
            )
        )
        now = self._clock.now_us()
        await self._write(lambda db: steps.end_wait(db, self.lease, record, timed_out, now))

    async def cancel(self, record: StepRecord) -> list[StepRecord]:
        """Store that the workflow cancelled the step, unless it has ended."""
        lease, now = self.lease, self._clock.now_us()

        def told(cancelled: steps.Cancelled | None, _: BaseException | None) -> None:
            if cancelled is not None:
                self._telling.tell(self._ref, cancelled[1])

        state, _, waiters = await self._storage.submit(lambda db: steps.cancel(db, lease, record, now), told)
        record.state = state
        return waiters

    async def pin(self, digest: str, modules: Mapping[str, str]) -> Mapping[str, str]:
        """Return the pinned code."""
        return await self._storage.submit(lambda db: instances.pin(db, self.lease, digest, modules))

    @property
    def is_heard(self) -> bool:
        """Whether anybody wants to hear what happens to the instance."""
        return self._telling.is_heard(self._ref)

    def tell(self, happened: Iterable[Happened]) -> None:
        """Tell what has happened to the instance."""
        self._telling.tell(self._ref, happened)

    async def _write(self, operation: Operation[list[Happened]]) -> None:
        def told(happened: list[Happened] | None, _: BaseException | None) -> None:
            self.tell(happened or ())

        await self._storage.submit(operation, told)  # told whatever becomes of the step

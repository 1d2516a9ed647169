"""The embedded engine's journal: every record is fenced by the lease, and told after its commit."""

from __future__ import annotations

from collections.abc import Mapping

from dynflow.clock import Clock
from dynflow.engines import InstanceRef, Journal, Limits, StepKey, StepRecord, Told, shown_name
from dynflow.engines.embedded import instances, steps
from dynflow.engines.embedded.leases import Lease
from dynflow.engines.embedded.storage import Storage
from dynflow.engines.embedded.writer import Operation
from dynflow.engines.happened import Happened, attempt_started, step_ended
from dynflow.engines.telling import Telling
from dynflow.errors import WorkflowTimeoutError
from dynflow.failure import Failure


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
        self._ref, self._lease = ref, lease
        self._state_limit = limits.state

    def begin_attempt(self, record: StepRecord, told: Told) -> None:
        """Store that an attempt starts."""
        lease, limit = self._lease, self._state_limit

        def durable(number: int | None, error: BaseException | None) -> None:
            if number is not None and self._telling.is_heard(self._ref):
                self._telling.tell(self._ref, (attempt_started(record, number),))
            told(error)

        self._storage.tell(lambda db: steps.begin_attempt(db, lease, record, limit), durable)

    def finish_step(self, record: StepRecord, told: Told) -> None:
        """Store a step's final state."""
        lease = self._lease

        def durable(number: int | None, error: BaseException | None) -> None:
            if number is not None and self._telling.is_heard(self._ref):
                self._telling.tell(self._ref, (step_ended(record, number),))
            told(error)

        self._storage.tell(lambda db: steps.finish_step(db, lease, record), durable)

    async def delay_retry(self, record: StepRecord) -> None:
        """Store a failed attempt."""
        await self._write(lambda db: [steps.delay_retry(db, self._lease, record)])

    async def begin_wait(self, record: StepRecord) -> None:
        """Store a sleep or a wait."""
        lease, limit = self._lease, self._state_limit
        await self._write(lambda db: steps.begin_wait(db, lease, record, limit))

    async def end_wait(self, record: StepRecord) -> None:
        """End a wait whose deadline has passed."""
        timed_out = Failure.of(
            WorkflowTimeoutError(
                f"wait_for_event {shown_name(record.name)!r}: no event of type {record.event_type!r} came in time"
            )
        )
        now = self._clock.now_us()
        await self._write(lambda db: steps.end_wait(db, self._lease, record, timed_out, now))

    async def cancel(self, record: StepRecord) -> list[StepRecord]:
        """Store that the workflow cancelled the step, unless it has ended."""
        lease, now = self._lease, self._clock.now_us()

        def told(cancelled: steps.Cancelled | None, _: BaseException | None) -> None:
            if cancelled is not None:
                self._telling.tell(self._ref, cancelled[1])

        state, _, waiters = await self._storage.submit(lambda db: steps.cancel(db, lease, record, now), told)
        record.state = state
        return waiters

    async def pin(self, digest: str, modules: Mapping[str, str]) -> Mapping[str, str]:
        """Return the pinned code."""
        return await self._storage.submit(lambda db: instances.pin(db, self._lease, digest, modules))

    async def _write(self, operation: Operation[list[Happened]]) -> None:
        def told(happened: list[Happened] | None, _: BaseException | None) -> None:
            self._telling.tell(self._ref, happened or ())

        await self._storage.submit(operation, told)  # told whatever becomes of the step

"""The embedded engine's journal: every record is fenced by the lease's epoch, and told after its commit."""

from __future__ import annotations

from collections.abc import Mapping

from dynflow.clock import Clock
from dynflow.engines import Journal, Limits, StepKey, StepRecord
from dynflow.engines.embedded import instances, steps
from dynflow.engines.embedded.rows import Happened, InstanceRow
from dynflow.engines.embedded.storage import Storage
from dynflow.engines.embedded.telling import Telling
from dynflow.engines.embedded.writer import Operation
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
        row: InstanceRow,
        records: dict[StepKey, StepRecord],
    ) -> None:
        self.steps = records
        self._storage, self._telling, self._clock = storage, telling, clock
        self._key, self._epoch, self._ref = row.key, row.epoch, row.ref
        self._state_limit = limits.state

    async def begin_attempt(self, record: StepRecord) -> None:
        """Store that an attempt starts."""
        key, epoch, limit = self._key, self._epoch, self._state_limit
        await self._write(lambda db: [steps.begin_attempt(db, key, epoch, record, limit)])

    async def finish_step(self, record: StepRecord) -> None:
        """Store a step's final state."""
        await self._write(lambda db: [steps.finish_step(db, self._key, self._epoch, record)])

    async def delay_retry(self, record: StepRecord) -> None:
        """Store a failed attempt."""
        await self._write(lambda db: [steps.delay_retry(db, self._key, self._epoch, record)])

    async def begin_wait(self, record: StepRecord) -> None:
        """Store a sleep or a wait."""
        key, epoch, limit = self._key, self._epoch, self._state_limit
        await self._write(lambda db: steps.begin_wait(db, key, epoch, record, limit))

    async def end_wait(self, record: StepRecord) -> None:
        """End a wait whose deadline has passed."""
        timed_out = Failure.of(
            WorkflowTimeoutError(
                f"wait_for_event {record.name!r}: no event of type {record.event_type!r} came in time"
            )
        )
        now = self._clock.now_us()
        await self._write(lambda db: steps.end_wait(db, self._key, self._epoch, record, timed_out, now))

    async def cancel(self, record: StepRecord) -> list[StepRecord]:
        """Store that the workflow cancelled the step, unless it has ended."""
        key, epoch, now = self._key, self._epoch, self._clock.now_us()
        state, happened, waiters = await self._storage.submit(
            lambda db: steps.cancel(db, key, epoch, record, now)
        )
        record.state = state
        self._telling.tell(self._ref, happened)
        return waiters

    async def pin(self, digest: str, modules: Mapping[str, str]) -> Mapping[str, str]:
        """Return the pinned code."""
        return await self._storage.submit(
            lambda db: instances.pin(db, self._key, self._epoch, digest, modules)
        )

    async def _write(self, operation: Operation[list[Happened]]) -> None:
        self._telling.tell(self._ref, await self._storage.submit(operation))

"""What a run is told of its caches, as rows: what each command found, why, and what became of what it left."""

from __future__ import annotations

from ci_platform.caches.opened import OpenCache
from ci_platform.model import RunCache
from ci_platform.stacks import LayerAuthor
from ci_platform.store import Store, Transaction, col
from dynflow.clock import Clock

_LONGEST = 4000
"""Characters of a reason."""


class CacheRecords:
    """The rows. Errors: UnavailableError."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock

    async def add(self, run_id: str, author: LayerAuthor, cache: OpenCache, reason: str) -> int | None:
        """Write down what a command found; returns the id of the row."""
        row = RunCache(
            run_id=run_id,
            step=author.step[:256],
            count=author.count,
            attempt=author.attempt,
            key=cache.key,
            outcome=cache.outcome,
            reason=reason[:_LONGEST],
            opened_at=self._clock.now(),
        )

        def insert(tx: Transaction) -> int | None:
            return tx.add(row).id

        return await self._store.write(insert)

    async def saved(self, cache: OpenCache, told: str) -> None:
        """Write down what became of what the command left."""
        where = col(RunCache.id) == cache.record
        await self._store.write(lambda tx: tx.change(RunCache, {"saved": told[:_LONGEST]}, where))

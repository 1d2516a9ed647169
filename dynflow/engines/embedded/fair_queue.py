"""Who runs next: instances that go on before new ones, and new ones fairly between tenants.

An instance has a rank in the file. In memory there is one *lane* for each workflow and tenant that has something
queued, with the lowest rank of its instances: whose turn it is does not depend on how many wait behind.
"""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Container
from typing import NamedTuple

# Woken instances go before new ones, whose ranks are not negative.
_WOKEN_RANK = -(1 << 62)
# From this many on, tenants that are behind the virtual time are forgotten: they need no memory of their own.
_MANY_TENANTS = 10_000


class Lane(NamedTuple):
    """A workflow and tenant with something queued; its first instance has `rank`, or a higher one."""

    rank: int
    workflow: str
    tenant: str


class FairQueue:
    """Start-time fair queueing. Lives in the writer's thread.

    A tenant's next instance ranks one after its last, but never before what is being served now: whoever has
    many waits behind whoever has few. `virtual` is the rank served last.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self.is_stale = False
        """Whether a transaction that was rolled back may have left it behind the file."""
        self._first: dict[tuple[str, str], int] = {}
        self._heaps: dict[str, list[tuple[int, str]]] = {}
        self._last: dict[str, int] = {}
        self._virtual, self._woken = 0, 0
        self._forget_at = _MANY_TENANTS
        self._read(db)

    def _read(self, db: sqlite3.Connection) -> None:
        lanes = db.execute(
            "SELECT workflow, tenant, min(rank), max(rank), max(CASE WHEN rank < 0 THEN rank END),"
            " min(CASE WHEN rank >= 0 THEN rank END) FROM instances INDEXED BY instances_queue"
            " WHERE status = 'queued' GROUP BY workflow, tenant"
        ).fetchall()
        for workflow, tenant, first, last, _, _ in lanes:
            self.put(Lane(first, workflow, tenant))
            self._last[tenant] = max(self._last.get(tenant, -1), last)
        self._woken = max((woken - _WOKEN_RANK for *_, woken, _ in lanes if woken is not None), default=0)
        self._virtual = min((new for *_, new in lanes if new is not None), default=0)

    def rank_new(self, tenant: str) -> int:
        """Return the rank of a new instance, to be `put_new` once it is stored."""
        return max(self._last.get(tenant, -1) + 1, self._virtual)

    def put_new(self, lane: Lane) -> None:
        """Note that a lane has a new instance, of the rank from `rank_new`."""
        self._last[lane.tenant] = lane.rank
        self.put(lane)

    def rank_woken(self) -> int:
        """Return the rank of an instance that goes on, to be `put`: before all new ones, first come first served."""
        self._woken += 1
        return _WOKEN_RANK + self._woken

    def put(self, lane: Lane) -> None:
        """Note that a lane has an instance of this rank."""
        rank, workflow, tenant = lane
        first = self._first.get((workflow, tenant))
        if first is None or rank < first:
            self._first[workflow, tenant] = rank
            heapq.heappush(self._heaps.setdefault(workflow, []), (rank, tenant))

    def first(self, workflows: Container[str]) -> Lane | None:
        """Return the lane of these workflows whose turn it is. It may be found to have nothing any more."""
        best: Lane | None = None
        for workflow in list(self._heaps):
            if workflow in workflows:
                heap = self._heaps[workflow]
                while heap and self._first.get((workflow, heap[0][1])) != heap[0][0]:
                    heapq.heappop(heap)
                if not heap:
                    del self._heaps[workflow]
                elif best is None or heap[0][0] < best.rank:
                    best = Lane(heap[0][0], workflow, heap[0][1])
        return best

    @property
    def is_empty(self) -> bool:
        """Whether nothing is queued."""
        return not self._first

    def take(self, lane: Lane) -> None:
        """Take a lane out; `put` brings it back."""
        self._first.pop((lane.workflow, lane.tenant), None)

    def served(self, rank: int) -> None:
        """Note that the instance of this rank was claimed."""
        self._virtual = max(self._virtual, rank)
        if len(self._last) >= self._forget_at:
            self._last = {tenant: last for tenant, last in self._last.items() if last >= self._virtual}
            self._forget_at = max(_MANY_TENANTS, 2 * len(self._last))

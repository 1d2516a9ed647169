"""Ranks of queued instances: woken before new ones, and new ones fairly between tenants."""

from __future__ import annotations

import sqlite3

# Woken instances go before new ones, whose ranks are not negative.
_WOKEN_RANK = -(1 << 62)
# From this many on, tenants that are behind the virtual time are forgotten: they need no memory of their own.
_MANY_TENANTS = 10_000


class FairQueue:
    """Start-time fair queueing. Lives in the writer's thread.

    A tenant's next instance ranks one after its last, but never before what is being served now: whoever has
    many waits behind whoever has few. `virtual` is the rank served last.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        rows = db.execute(
            "SELECT tenant, min(rank), max(rank) FROM instances WHERE status = 'queued' AND rank >= 0 GROUP BY tenant"
        ).fetchall()
        self._last: dict[str, int] = {tenant: last for tenant, _, last in rows}
        self._virtual: int = min((first for _, first, _ in rows), default=0)
        woken = db.execute("SELECT max(rank) FROM instances WHERE status = 'queued' AND rank < 0").fetchone()[
            0
        ]
        self._woken: int = 0 if woken is None else woken - _WOKEN_RANK
        self._forget_at = _MANY_TENANTS

    def rank_new(self, tenant: str) -> int:
        """Return the rank of a new instance of `tenant`."""
        rank = max(self._last.get(tenant, -1) + 1, self._virtual)
        self._last[tenant] = rank
        return rank

    def rank_woken(self) -> int:
        """Return the rank of an instance that goes on: before all new ones, first come first served."""
        self._woken += 1
        return _WOKEN_RANK + self._woken

    def served(self, rank: int) -> None:
        """Note that the instance of this rank was claimed."""
        self._virtual = max(self._virtual, rank)
        if len(self._last) >= self._forget_at:
            self._last = {tenant: last for tenant, last in self._last.items() if last >= self._virtual}
            self._forget_at = max(_MANY_TENANTS, 2 * len(self._last))

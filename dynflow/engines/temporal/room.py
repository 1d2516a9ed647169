"""Whose turn it is on this machine: segments that were taken from the queue and wait for a slot."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Guest:
    """A segment that wants a slot; `turn` is done when it has one."""

    workflow: str
    tenant: str
    rank: tuple[int, int]
    turn: asyncio.Future[None]


class Room:
    """Slots in all, of each workflow, and of each tenant where `per_tenant` says so.

    Instances that go on are before new ones. New ones take turns between tenants (start-time fair queueing): a
    tenant's next ranks one after its last, but never before what is being served.
    """

    def __init__(self, slots: int, per_tenant: int | None, of_workflow: Callable[[str], int]) -> None:
        self._slots, self._per_tenant, self._of_workflow = slots, per_tenant, of_workflow
        self._running: Counter[str] = Counter()
        self._tenants: Counter[str] = Counter()
        self._waiting: list[Guest] = []
        self._last: dict[str, int] = {}
        self._virtual = self._woken = 0

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def enter(self, workflow: str, tenant: str, *, is_new: bool) -> Guest:
        """Ask for a slot; to be given to `leave` in the end, whether there was one or not."""
        if is_new:
            rank = max(self._last.get(tenant, -1) + 1, self._virtual)
            self._last[tenant] = rank
            order = (1, rank)
        else:
            self._woken += 1
            order = (0, self._woken)
        guest = Guest(workflow, tenant, order, asyncio.get_running_loop().create_future())
        self._waiting.append(guest)
        self._next()
        return guest

    def leave(self, guest: Guest) -> None:
        """Give the slot back, or the place among those who wait."""
        if guest in self._waiting:
            self._waiting.remove(guest)
        else:
            self._running[guest.workflow] -= 1
            self._tenants[guest.tenant] -= 1
            if not self._tenants[guest.tenant]:
                del self._tenants[guest.tenant]
        self._next()

    def last_of_the_most(self) -> Guest | None:
        """Return the last guest of the tenant who has most of them waiting."""
        counts = Counter(guest.tenant for guest in self._waiting)
        if not counts:
            return None
        most = counts.most_common(1)[0][0]
        return max((guest for guest in self._waiting if guest.tenant == most), key=lambda guest: guest.rank)

    def _next(self) -> None:
        while sum(self._running.values()) < self._slots:
            fitting = [guest for guest in self._waiting if self._fits(guest)]
            if not fitting:
                return
            guest = min(fitting, key=lambda one: one.rank)
            self._waiting.remove(guest)
            self._running[guest.workflow] += 1
            self._tenants[guest.tenant] += 1
            if guest.rank[0]:
                self._virtual = max(self._virtual, guest.rank[1])
                if not self._waiting:
                    self._last = {
                        tenant: last for tenant, last in self._last.items() if last >= self._virtual
                    }
            if not guest.turn.done():
                guest.turn.set_result(None)

    def _fits(self, guest: Guest) -> bool:
        return self._running[guest.workflow] < self._of_workflow(guest.workflow) and (
            self._per_tenant is None or self._tenants[guest.tenant] < self._per_tenant
        )

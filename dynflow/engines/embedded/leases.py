"""Which instances run, and what has been counted of each since its claim. Lives in the writer's thread.

A lease is the fence of a segment: whoever takes the instance away ends the lease, and nothing that the segment
records after that is stored. It keeps the two counters that every record changes, so that a record need not
change the instance's row; the row gets them back when the lease ends. A process that dies loses them, and
`history.recount` finds them again. What a transaction did here is undone if it is rolled back.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynflow.errors import LeaseLostError


@dataclass(slots=True, eq=False)
class Lease:
    """The right of one segment to record. `events`: number of its last history event; the rest: see schema.sql."""

    key: int
    events: int
    size: int
    retention: bytes | None
    is_lost: bool = False

    def check(self) -> None:
        """Raise LeaseLostError once the instance was taken away."""
        if self.is_lost:
            raise LeaseLostError("the instance was terminated, restarted, deleted or taken over")


class Leases:
    """The leases of the instances that run, by key."""

    def __init__(self) -> None:
        self._by_key: dict[int, Lease] = {}
        self.undo: list[tuple[Lease, int, int, bool]] = []
        """What the transaction has changed here so far, as it was before: counters, and whether it was no lease."""

    def grant(self, key: int, events: int, size: int, retention: bytes | None) -> Lease:
        """Give a lease to an instance that has none."""
        lease = self._by_key[key] = Lease(key, events, size, retention)
        self.undo.append((lease, events, size, True))
        return lease

    def of(self, key: int) -> Lease | None:
        """Return the lease of an instance, None if it does not run."""
        return self._by_key.get(key)

    def end(self, key: int) -> Lease | None:
        """Take the lease of an instance away, if it has one; returns it for its counters."""
        lease = self._by_key.pop(key, None)
        if lease is not None:
            self.undo.append((lease, lease.events, lease.size, False))
            lease.is_lost = True
        return lease

    def count(self, lease: Lease, events: int, size: int) -> int:
        """Count events and bytes; returns the number of the last event."""
        self.undo.append((lease, lease.events, lease.size, False))
        lease.events += events
        lease.size += size
        return lease.events

    def committed(self) -> None:
        """Keep what the transaction did."""
        self.undo.clear()

    def rolled_back(self) -> None:
        """Undo what the transaction did."""
        for lease, events, size, is_lost in reversed(self.undo):
            lease.events, lease.size, lease.is_lost = events, size, is_lost
            if is_lost:
                self._by_key.pop(lease.key, None)
            else:
                self._by_key[lease.key] = lease
        self.undo.clear()

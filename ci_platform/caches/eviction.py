"""Which entries of caches go when there are too many. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from ci_platform.caches.entries import CacheEntry

MOST_ENTRIES = 1000
"""Of one repository: looking for a prefix compares them all."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that caches may use: of all repositories, of one, and up to which one loses nothing to others."""

    total: int = 20 << 30
    repository: int = 10 << 30
    floor: int = 1 << 30


def victims(
    entries: Collection[CacheEntry], budget: Budget, *, spared: str = "", outside_only: bool = False
) -> list[CacheEntry]:
    """Return what goes, so that the rest keeps the budget as far as it can.

    The least recently used go first, those of forks before all others. Not `spared` (an id), none that is in use, and
    for the sake of others none of a repository that has no more than the floor. `outside_only`: none but those of
    forks, whose doing this is.
    """
    usage = _Usage(budget, entries)
    candidates = sorted(
        (
            each
            for each in entries
            if not each.pinned and each.id != spared and (each.outside or not outside_only)
        ),
        key=lambda each: (not each.outside, each.used_at, each.id),
    )
    gone: dict[str, CacheEntry] = {}
    for must_go in (usage.is_crowded, usage.is_too_much):
        for each in candidates:
            if each.id not in gone and must_go(each.tenant):
                usage.remove(each)
                gone[each.id] = each
    return list(gone.values())


def has_room(entries: Collection[CacheEntry], budget: Budget, tenant: str) -> bool:
    """Whether a repository keeps its budget, and is none of those for whom all together do not keep theirs."""
    usage = _Usage(budget, entries)
    return not (usage.is_crowded(tenant) or usage.is_too_much(tenant))


class _Usage:
    """How much there is."""

    def __init__(self, budget: Budget, entries: Collection[CacheEntry]) -> None:
        self._budget = budget
        self._size, self._count = Counter[str](), Counter[str]()
        for each in entries:
            self._size[each.tenant] += each.size
            self._count[each.tenant] += 1
        self._total = sum(self._size.values())

    def remove(self, entry: CacheEntry) -> None:
        self._size[entry.tenant] -= entry.size
        self._count[entry.tenant] -= 1
        self._total -= entry.size

    def is_crowded(self, tenant: str) -> bool:
        return self._size[tenant] > self._budget.repository or self._count[tenant] > MOST_ENTRIES

    def is_too_much(self, tenant: str) -> bool:
        return self._total > self._budget.total and self._size[tenant] > self._budget.floor

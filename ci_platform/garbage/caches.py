"""Caches of commands: a run whose cache is gone makes it anew."""

from __future__ import annotations

from collections.abc import Sequence

from ci_platform.caches import Caches
from ci_platform.garbage import Allowance, Item


class CacheEntries:
    """The entries of all caches. They have a budget for each repository besides, see `Caches.tidy`."""

    kind = "caches"

    def __init__(self, caches: Caches, allowance: Allowance) -> None:
        self.allowance = allowance
        self._caches = caches

    async def items(self) -> Sequence[Item]:
        """Return all entries."""
        return [
            Item(
                each.id,
                each.repo,
                each.size,
                each.used_at,
                each.files,
                "a command uses it" if each.pinned else None,
            )
            for each in self._caches.entries()
        ]

    async def collect(self, name: str) -> bool:
        """Delete one, unless a command uses it."""
        gone = await self._caches.delete(name)
        return gone or all(each.id != name for each in self._caches.entries())

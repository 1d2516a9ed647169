"""Files that LFS keeps: fetched again when a workspace needs them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import UTC, datetime

import anyio.to_thread

from ci_platform.garbage import Allowance, Item
from ci_platform.source.lfs_store import LfsStore
from ci_platform.source.names import module_mirrors
from ci_platform.tree_store import SAFE_FOR

Repos = Callable[[], Awaitable[Collection[str]]]
"""Asks of which repositories runs that have not ended will want files that no tree has now."""


class LfsFiles:
    """Files by their places in the store. Those that trees on disk have too stay: deleting them would free nothing."""

    kind = "lfs files"

    def __init__(
        self,
        store: LfsStore,
        allowance: Allowance,
        *,
        wanted: Repos | None = None,
        safe_for: float = SAFE_FOR,
    ) -> None:
        self.allowance = allowance
        self._store, self._wanted, self._safe_for = store, wanted, safe_for

    async def items(self) -> Sequence[Item]:
        """Return all files."""
        repos = await self._wanted() if self._wanted else ()
        wanted = {folder for repo in repos for folder in module_mirrors(repo)}
        return await anyio.to_thread.run_sync(self._items, wanted)

    def _items(self, wanted: Collection[str]) -> list[Item]:
        now, found = time.time(), list[Item]()
        for held in self._store.held():
            pinned = "a tree on disk has it" if held.linked else None
            if pinned is None and held.name.partition("/")[0] in wanted:
                pinned = "a run that has not ended may need it"
            if held.used_at > now - self._safe_for:
                pinned = "used a short while ago"
            used_at = datetime.fromtimestamp(held.used_at, UTC)
            found.append(Item(held.name, None, held.size, used_at, pinned=pinned))
        return found

    async def collect(self, name: str) -> bool:
        """Delete one, unless it was used meanwhile."""
        before = time.time() - self._safe_for
        return await anyio.to_thread.run_sync(lambda: self._store.remove(name, before))

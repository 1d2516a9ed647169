"""Mirrors of remote repositories: fetched again when they are needed."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import UTC, datetime

from ci_platform.fetching import Remote
from ci_platform.garbage import Allowance, Item
from ci_platform.source import Source
from ci_platform.source.names import is_module_mirror
from ci_platform.tree_store import SAFE_FOR


class Mirrors:
    """Mirrors by repository. Those of repositories with a run that has not ended (`wanted`) stay."""

    kind = "mirrors"

    def __init__(
        self,
        source: Source,
        allowance: Allowance,
        *,
        wanted: Callable[[], Awaitable[Collection[str]]],
        remote_of: Callable[[str], Awaitable[Remote | None]],
    ) -> None:
        self.allowance = allowance
        self._source, self._wanted, self._remote_of = source, wanted, remote_of

    async def items(self) -> Sequence[Item]:
        """Return all mirrors."""
        wanted = await self._wanted()
        return [
            Item(
                held.repo,
                held.repo,
                held.size,
                datetime.fromtimestamp(held.used_at, UTC),
                held.files,
                await self._pinned(held.repo, held.used_at, wanted),
            )
            for held in await self._source.mirrors()
        ]

    async def _pinned(self, repo: str, used_at: float, wanted: Collection[str]) -> str | None:
        if repo in wanted:
            return "a run that has not ended stands on it"
        if used_at > time.time() - SAFE_FOR:
            return "used a short while ago"
        lost = not is_module_mirror(repo) and await self._remote_of(repo) is None
        return "it could not be fetched again" if lost else None

    async def collect(self, name: str) -> bool:
        """Delete one, unless a run has begun to use it."""
        if name in await self._wanted():
            return False
        return await self._source.remove_mirror(name, time.time() - SAFE_FOR)

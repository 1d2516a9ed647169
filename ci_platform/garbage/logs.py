"""Logs of runs: deleted early they say so; deleted at the end of their time they are as if they had never been."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio.to_thread

from ci_platform.garbage import Allowance, Item
from ci_platform.logs import Logs
from dynflow.clock import Clock

Repos = Callable[[], Awaitable[Mapping[str, str]]]
"""Asks for the repositories of all runs that are kept, by run."""

OpenRuns = Callable[[], Awaitable[Collection[str]]]
"""Asks which runs have not ended."""


class RunLogs:
    """The logs of a run together, kept for some time after the last line."""

    kind = "logs"

    def __init__(
        self,
        logs: Logs,
        allowance: Allowance,
        clock: Clock,
        *,
        kept_for: timedelta,
        still_open: OpenRuns,
        repos: Repos,
    ) -> None:
        self.allowance = allowance
        self._logs, self._clock, self._kept_for = logs, clock, kept_for
        self._still_open, self._repos = still_open, repos

    async def items(self) -> Sequence[Item]:
        """Return the runs that have logs."""
        still_open, repos = await self._still_open(), await self._repos()
        pinned, now = self._logs.growing().union(still_open), self._clock.now()

        def look() -> list[Item]:
            found = (self._item(path, pinned, repos) for path in self._logs.folders())
            # What has been collected is of no use to make room, and goes when its time is over.
            return [item for item in found if item and (item.size or self._is_over(item, now))]

        return await anyio.to_thread.run_sync(look)

    def _is_over(self, item: Item, now: datetime) -> bool:
        return item.expires_at is not None and item.expires_at <= now

    def _item(self, folder: Path, pinned: Collection[str], repos: Mapping[str, str]) -> Item | None:
        try:
            found = [path.stat() for path in folder.iterdir()]
            newest = max((each.st_mtime for each in found), default=folder.stat().st_mtime)
        except (FileNotFoundError, NotADirectoryError):
            return None
        used_at = datetime.fromtimestamp(newest, UTC)
        run_id = folder.name
        return Item(
            run_id,
            repos.get(run_id),
            sum(each.st_size for each in found),
            used_at,
            len(found),
            "the run has not ended" if run_id in pinned else None,
            used_at + self._kept_for,
        )

    async def collect(self, name: str) -> bool:
        """Delete a run's logs, unless it goes on by now."""
        if name in await self._still_open():
            return False
        item = await anyio.to_thread.run_sync(self._item, self._logs.root / name, (), {})
        if item is None or name in self._logs.growing():
            return item is None
        if self._is_over(item, self._clock.now()):
            self._logs.delete(name)
            return True
        return await self._logs.collect(name)

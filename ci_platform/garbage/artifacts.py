"""Artifacts: nobody can make them again, so each has a time; before it they go only where there are too many."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence

from ci_platform.artifacts import Artifacts
from ci_platform.caches.scopes import tenant_of
from ci_platform.garbage import Allowance, Item
from ci_platform.model import ArtifactRow, Repository, Run, RunFork
from ci_platform.store import Store, Transaction, col
from dynflow.clock import Clock

OpenRuns = Callable[[], Awaitable[Collection[str]]]
"""Asks which runs have not ended."""

_IN_TIME, _IN_NEED = "its time was over", "there was no room for it"


class KeptArtifacts:
    """Artifacts of trusted runs, or (`outside`) of forks' pull requests, which never take the room of the others."""

    def __init__(
        self,
        artifacts: Artifacts,
        store: Store,
        clock: Clock,
        allowance: Allowance,
        *,
        still_open: OpenRuns,
        outside: bool = False,
    ) -> None:
        self.kind = "artifacts of forks" if outside else "artifacts"
        self.allowance, self._outside = allowance, outside
        self._artifacts, self._store, self._clock, self._still_open = artifacts, store, clock, still_open

    async def items(self) -> Sequence[Item]:
        """Return all of them. The time of those whose repository is gone is over."""
        wanted = {*await self._still_open(), *await self._store.read(_ancestors)}
        there = col(Repository.deleted_at).is_(None)
        tenants = {tenant_of(each) for each in await self._store.read(lambda tx: tx.all(Repository, there))}
        rows = [row for row in await self._artifacts.records.live() if row.outside == self._outside]
        return [self._item(row, wanted, tenants) for row in rows]

    def _item(self, row: ArtifactRow, wanted: Collection[str], tenants: Collection[str]) -> Item:
        # A stranger's run may wait at a gate for ever, and holds nothing beyond its time.
        is_held = row.run_id in wanted and not (row.outside and row.expires_at <= self._clock.now())
        pinned = "a run that has not ended may need it" if is_held else None
        if self._artifacts.is_read(row.id):
            pinned = "somebody reads it"
        expires_at = row.expires_at if row.tenant in tenants else row.created_at
        return Item(
            f"{row.run_id}/{row.name}", row.repo, row.taken, row.created_at, row.files + 3, pinned, expires_at
        )

    async def collect(self, name: str) -> bool:
        """Delete one, unless a run needs it by now or somebody reads it."""
        found = await self._store.read(lambda tx: _with_its_repository(tx, name))
        if found is None:
            return True
        row, tenant = found
        wanted = {*await self._still_open(), *await self._store.read(_ancestors)}
        item = self._item(row, wanted, {tenant})
        if item.pinned is not None:
            return False
        is_over = item.expires_at is not None and item.expires_at <= self._clock.now()
        await self._artifacts.forget([row.id], _IN_TIME if is_over else _IN_NEED)
        return True


def _with_its_repository(tx: Transaction, item: str) -> tuple[ArtifactRow, str] | None:
    """Return an artifact that is there, and the folder of its repository as that is now."""
    run_id, _, name = item.partition("/")
    where = (col(ArtifactRow.run_id) == run_id, col(ArtifactRow.name) == name)
    row = tx.first(ArtifactRow, *where, col(ArtifactRow.deleted_at).is_(None))
    if row is None:
        return None
    repository = tx.first(Repository, col(Repository.name) == row.repo, col(Repository.deleted_at).is_(None))
    return row, "" if repository is None else tenant_of(repository)


def _ancestors(tx: Transaction) -> set[str]:
    """Return the runs of which what-ifs that have not ended may need the artifacts."""
    still_open = {
        row.id for row in tx.all(Run, col(Run.conclusion).is_(None), col(Run.forked_from).is_not(None))
    }
    forks = [tx.get(RunFork, run_id) for run_id in still_open]
    return {ancestor for fork in forks if fork is not None for ancestor in fork.ancestors}

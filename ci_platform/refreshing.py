"""Fills imported repositories and keeps them like their remotes; mends those whose objects are damaged.

The first filling starts no runs; what later ones move starts runs as a push does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta

import anyio

from ci_platform.backoff import backoff
from ci_platform.errors import FailedError, NotFoundError, PlatformError, RejectedError, UnavailableError
from ci_platform.git_commands import GitError
from ci_platform.imports import Imports
from ci_platform.mirroring import Mirror, Shape, damage
from ci_platform.model import ImportRow
from ci_platform.pushes import Pushes, changes
from ci_platform.source import Source
from ci_platform.store import Store, Transaction, col
from dynflow.clock import Clock

_log = logging.getLogger(__name__)

ACTOR = "import"
_AT_ONCE = 4
"""Refreshes at the same time: each is one git that mostly waits for its remote."""

_VERIFY_EVERY = timedelta(days=7)
_TRIES = 58
"""With the pauses between them about a day; then somebody has to ask again."""


class Refresher:
    """Works off what is due. `serve` runs beside the server, in the same event loop."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        imports: Imports,
        source: Source,
        pushes: Pushes,
        protocols: str = "http:https",
        within: timedelta = timedelta(hours=1),
    ) -> None:
        self._store, self._clock, self._imports = store, clock, imports
        self._source, self._pushes = source, pushes
        self._protocols, self._within = protocols, within
        self._busy: set[str] = set()

    async def serve(self) -> None:
        """Do what is due, for ever."""
        limiter = anyio.CapacityLimiter(_AT_ONCE)
        async with anyio.create_task_group() as tasks:
            while True:
                for repo in await self._due():
                    self._busy.add(repo)
                    tasks.start_soon(self._one, repo, limiter)
                await self._imports.waker.wait(await self._next_due())

    async def _due(self) -> list[str]:
        now = self._clock.now()
        rows = await self._store.read(
            lambda tx: tx.all(ImportRow, col(ImportRow.due_at) <= now, order=col(ImportRow.due_at))
        )
        return [row.repo for row in rows if row.repo not in self._busy]

    async def _next_due(self) -> datetime | None:
        rows = await self._store.read(
            lambda tx: tx.all(ImportRow, col(ImportRow.due_at).is_not(None), order=col(ImportRow.due_at))
        )
        return next((row.due_at for row in rows if row.repo not in self._busy), None)

    async def _one(self, repo: str, limiter: anyio.CapacityLimiter) -> None:
        try:
            async with limiter:
                await self.work(repo)
        except Exception:  # noqa: BLE001 - one import's defect must not keep the others from being refreshed
            _log.exception("the import %s could not be refreshed", repo)
        finally:
            self._busy.discard(repo)
            self._imports.waker.wake()

    async def work(self, repo: str) -> None:
        """Refresh one import now, and write down how that went. Nothing where it is no import (any more)."""
        row = await self._store.read(lambda tx: tx.get(ImportRow, repo))
        if row is None:
            return
        try:
            verified = await self._refresh(row)
        except PlatformError as error:
            await self._failed(row, error)
        else:
            now = self._clock.now()
            values = {"state": "ready", "refreshed_at": now, "attempts": 0, "last_error": None}
            await self._done(row, values | ({"verified_at": now, "verify": False} if verified else {}))

    async def _refresh(self, row: ImportRow) -> bool:
        """Fill or refresh; return whether every object was looked at."""
        mirror = Mirror(
            self._source.path(row.repo), self._imports.remote_of(row), self._protocols, self._within
        )
        shape, verified = Shape(row.depth, row.blobs), False
        async with self._source.writing(row.repo):
            if not await self._imports.has(row.repo):
                return False  # deleted while it waited
            if not await self._source.exists(row.repo):
                await self._fill(row.repo, mirror, shape)
                return True
            before = await self._before(row.repo)
            if before is None or await self._is_damaged(row, mirror, shape):
                await self._mend(row.repo, mirror, shape)
                verified = True
            else:
                verified = row.verify or self._is_unverified(row)
            if before is not None:
                updates = changes(before, await self._source.ref_snapshot(row.repo))
                if updates:
                    await self._pushes.accept(row.repo, updates, actor=ACTOR)
        return verified

    async def _before(self, repo: str) -> Mapping[str, str] | None:
        """Return the refs; None where they cannot even be read."""
        try:
            return await self._source.ref_snapshot(repo)
        except NotFoundError:
            return None

    async def _fill(self, repo: str, mirror: Mirror, shape: Shape) -> None:
        async with self._source.making(repo) as scratch:
            await _filled(replace(mirror, path=scratch), shape)
            # Before anybody can see it: a thousand branches that were there before are no thousand pushes.
            await self._pushes.adopt(repo, await self._source.refs_at(scratch))

    async def _is_damaged(self, row: ImportRow, mirror: Mirror, shape: Shape) -> bool:
        """Refresh in place; return whether what is here cannot be kept. Raises what the remote is to blame for."""
        try:
            await mirror.fill(shape)
        except GitError as error:
            found = await damage(mirror.path, self._within)
            if found is None:
                raise UnavailableError(f"refreshing {row.repo!r} failed: {error}") from None
        else:
            looked = row.verify or self._is_unverified(row)
            found = await damage(mirror.path, self._within) if looked else None
        if found is not None:
            _log.error("the import %s is damaged and is fetched anew: %s", row.repo, found)
        return found is not None

    def _is_unverified(self, row: ImportRow) -> bool:
        return row.verified_at is None or self._clock.now() - row.verified_at > _VERIFY_EVERY

    async def _mend(self, repo: str, mirror: Mirror, shape: Shape) -> None:
        async with self._source.making(repo) as scratch:
            await _filled(replace(mirror, path=scratch), shape)

    async def _failed(self, row: ImportRow, error: PlatformError) -> None:
        attempts = row.attempts + 1
        values = {"attempts": attempts, "last_error": str(error)[:1000]}
        _log.warning("the import %s could not be refreshed: %s", row.repo, error)
        if isinstance(error, FailedError | RejectedError) or attempts >= _TRIES:
            state = "failed" if row.refreshed_at is None else row.state
            await self._done(row, values | {"state": state})
        else:
            due_at = self._clock.now() + backoff(attempts)
            await self._done(row, values, due_at)

    async def _done(self, row: ImportRow, values: dict[str, object], due_at: datetime | None = None) -> None:
        def note(tx: Transaction) -> None:
            here = col(ImportRow.repo) == row.repo
            tx.change(ImportRow, values, here)
            # Asked for again meanwhile: then it stays due.
            tx.change(ImportRow, {"due_at": due_at}, here, col(ImportRow.due_at) == row.due_at)

        await self._store.write(note)


async def _filled(mirror: Mirror, shape: Shape) -> None:
    try:
        await mirror.fill(shape)
    except GitError as error:
        raise UnavailableError(f"fetching {mirror.remote.url} failed: {error}") from None

"""Repositories of our own from making to deleting: rows, folders, imports and tokens, in an order that survives a kill.

A row that is marked deleted is either on its way in (a fork's folder is made before anybody sees it) or on its way
out; at start, what such a row still has on disk is removed.
"""

from __future__ import annotations

from ci_platform.access import Access
from ci_platform.errors import InvalidInputError
from ci_platform.imports import Imports
from ci_platform.named_locks import NamedLocks
from ci_platform.pushes import Pushes
from ci_platform.repositories import Repositories, RepositoryView
from ci_platform.source import Source


class GitStore:
    """Forks and deletes repositories."""

    def __init__(
        self, repositories: Repositories, source: Source, imports: Imports, pushes: Pushes, access: Access
    ) -> None:
        self._repositories, self._source = repositories, source
        self._imports, self._pushes, self._access = imports, pushes, access
        self._names = NamedLocks()

    async def fork(self, parent: str, name: str) -> RepositoryView:
        """Make `name` a repository of its own with the branches, tags and commits that `parent` has now.

        It starts no run for what it begins with. Raises NotFoundError, ConflictError where the name is taken.
        """
        of = await self._repositories.get(parent)
        if of.forge != "local":
            raise InvalidInputError(f"{parent!r} lives at {of.forge}: fork it there, or import it first")
        # One at a time for a name: what is claimed and not yet registered is anybody's to claim again.
        async with self._names(name.lower()):
            await self._repositories.claim(name)
            await self._source.delete(name)
            if await self._source.exists(parent):
                await self._source.fork(parent, name)
                await self._pushes.adopt(name, await self._source.ref_snapshot(name))
            return await self._repositories.register(
                name, forge="local", default_branch=of.default_branch, parent=parent
            )

    async def delete(self, name: str) -> None:
        """Delete a repository with its tokens. Forks of it stay whole, and so do the pages of its runs.

        Raises NotFoundError, and ConflictError while a run of it has not ended.
        """
        async with self._names(name.lower()):
            await self._repositories.forget(name)
            await self._clear(name)

    async def _clear(self, name: str) -> None:
        await self._access.revoke_all_of(name)
        await self._imports.forget(name)
        await self._source.delete(name)

    async def sweep(self) -> None:
        """Finish what a killed process began to delete, or to fork. Call once at start."""
        for name in await self._repositories.deleted():
            if await self._source.exists(name) or await self._imports.has(name):
                await self._clear(name)

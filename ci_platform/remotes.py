"""Where each repository can be fetched from, with the credentials for it."""

from __future__ import annotations

from collections.abc import Mapping

from ci_platform.errors import NotFoundError
from ci_platform.fetching import Remote
from ci_platform.forges import Forge
from ci_platform.imports import Imports
from ci_platform.repositories import Repositories


class Remotes:
    """Looks remotes up when they are needed, so that no credentials lie around."""

    def __init__(self, repositories: Repositories, imports: Imports, forges: Mapping[str, Forge]) -> None:
        self._repositories, self._imports, self._forges = repositories, imports, forges

    async def __call__(self, repo: str) -> Remote | None:
        """Return where a repository comes from; None where it is our own, or not registered."""
        imported = await self._imports.remote(repo)
        if imported is not None:
            return imported
        try:
            found = await self._repositories.get(repo)
        except NotFoundError:
            return None
        if found.forge == "local":
            return None
        forge = self._forges[found.forge]
        return Remote(found.clone_url or forge.clone_url(repo), forge.credentials(repo))

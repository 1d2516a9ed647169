"""Which repository a submodule's address means for a run, and by whose leave it is read.

An address says nothing about who may read what is there. A run reads its own repository, and those that an
administrator has named for it (`reads`), with their credentials and out of their mirrors; everything else is fetched
as anybody could, without credentials, into a mirror that belongs to this repository alone. So no mirror is ever
shared by two repositories that were not put together by an administrator.
"""

from __future__ import annotations

from dataclasses import dataclass

from ci_platform.errors import ForbiddenError, NotFoundError
from ci_platform.fetching import Remote
from ci_platform.remotes import Remotes
from ci_platform.repositories import Repositories
from ci_platform.source.names import module_mirror
from ci_platform.submodules import canonical


@dataclass(frozen=True, slots=True)
class Place:
    """Where a submodule is: the repository `store` of ours. `registered`: it is one that the run may read.

    `remote` is None where it comes from nowhere else.
    """

    store: str
    remote: Remote | None
    registered: bool


class ModuleAccess:
    """Decides. `base_url` is the platform's own address."""

    def __init__(self, repositories: Repositories, remotes: Remotes, base_url: str) -> None:
        self._repositories, self._remotes, self._own = repositories, remotes, f"{base_url}/git"

    async def home(self, repo: str) -> str:
        """Return the address that relative ones begin at."""
        remote = await self._remotes(repo)
        return remote.url if remote is not None else self._served(repo)

    def _served(self, repo: str) -> str:
        return f"{self._own}/{repo}.git"

    async def place(self, repo: str, url: str, *, trusted: bool) -> Place:
        """Return where a run of `repo` finds what is at `url`. Raises ForbiddenError where it may not look there.

        A pull request from a fork names addresses of its own choice: it gets nobody's leave, and no credentials.
        """
        wanted = canonical(url)
        for name in await self._readable(repo) if trusted else []:
            if wanted in {canonical(self._served(name)), canonical(await self.home(name))}:
                return Place(name, await self._remotes(name), registered=True)
        if wanted.startswith((canonical(self._own) + "/", "file:")):
            raise ForbiddenError(_not_readable(repo, url, trusted=trusted))
        return Place(module_mirror(repo, url, trusted=trusted), Remote(url), registered=False)

    async def _readable(self, repo: str) -> list[str]:
        try:
            named = (await self._repositories.get(repo)).reads
        except NotFoundError:
            return [repo]
        found = [repo]
        for name in named:
            try:
                found.append((await self._repositories.get(name)).name)
            except NotFoundError:
                continue  # deleted since
        return found


def _not_readable(repo: str, url: str, *, trusted: bool) -> str:
    if not trusted:
        return f"a pull request from a fork does not read {url}"
    return (
        f"{repo!r} may not read {url} as a submodule: an administrator allows it with "
        f"`dynflow repo set {repo} --reads OWNER/NAME`"
    )

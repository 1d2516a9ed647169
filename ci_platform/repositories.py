"""The repositories whose changes start runs."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlsplit

from ci_platform.errors import ConflictError, InvalidInputError, NotFoundError
from ci_platform.model import Repository
from ci_platform.store import Store, Transaction, col
from dynflow.clock import Clock

# GitHub's own rules, which keep names harmless in paths and URLs as well.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}/(?!\.{1,2}$)[A-Za-z0-9_.-]{1,100}", re.ASCII)
_BRANCH = re.compile(r"(?![-/.])(?!.*(?:\.\.|//|@\{))[^\x00-\x20\x7f~^:?*\[\\]{1,255}(?<![/.])", re.ASCII)
# What git can fetch from without running a helper program of somebody else's choice (`ext::` does).
_CLONE_SCHEMES = frozenset({"https", "http", "file"})


@dataclass(frozen=True, slots=True)
class RepositoryView:
    """A registered repository. `clone_url` is None where the forge's own is used."""

    name: str
    forge: str
    default_branch: str
    clone_url: str | None
    enabled: bool
    created_at: datetime


class Repositories:
    """Registers repositories and finds them."""

    def __init__(self, store: Store, forges: Collection[str], clock: Clock) -> None:
        self._store, self._forges, self._clock = store, frozenset(forges), clock

    async def register(
        self, name: str, *, forge: str, default_branch: str = "main", clone_url: str | None = None
    ) -> RepositoryView:
        """Register `owner/repository`. The same again answers the same.

        Raises InvalidInputError, or ConflictError if the name is taken with other settings.
        """
        check_repository_name(name)
        self._check(forge, default_branch, clone_url)
        row = Repository(
            name=name,
            forge=forge,
            default_branch=default_branch,
            clone_url=clone_url,
            created_at=self._clock.now(),
        )

        def insert(tx: Transaction) -> Repository:
            # Names differ by more than case: GitHub's do, and mirrors may lie on a file system that folds it.
            held = next((one for one in tx.all(Repository) if one.name.lower() == name.lower()), None)
            if held is None:
                return tx.add(row)
            if (held.name, held.forge, held.clone_url) != (name, forge, clone_url):
                raise ConflictError(
                    f"repository {held.name!r} is registered already, at forge {held.forge!r}"
                )
            return held

        return _view(await self._store.write(insert))

    async def get(self, name: str) -> RepositoryView:
        """Return a repository. Raises NotFoundError."""
        row = await self._store.read(lambda tx: tx.get(Repository, name))
        if row is None:
            raise NotFoundError(f"repository {name[:200]!r} is not registered here")
        return _view(row)

    async def list(self) -> list[RepositoryView]:
        """Return all repositories by name."""
        rows = await self._store.read(lambda tx: tx.all(Repository, order=col(Repository.name)))
        return [_view(row) for row in rows]

    async def set_enabled(self, name: str, *, enabled: bool) -> RepositoryView:
        """Let a repository start runs, or not. Raises NotFoundError."""
        changed = await self._store.write(
            lambda tx: tx.change(Repository, {"enabled": enabled}, col(Repository.name) == name)
        )
        if not changed:
            raise NotFoundError(f"repository {name[:200]!r} is not registered here")
        return await self.get(name)

    def _check(self, forge: str, default_branch: str, clone_url: str | None) -> None:
        if forge not in self._forges:
            raise InvalidInputError(f"there is no forge {forge[:50]!r}: {', '.join(sorted(self._forges))}")
        if not _BRANCH.fullmatch(default_branch):
            raise InvalidInputError(f"{default_branch[:100]!r} cannot be a branch's name")
        if clone_url is not None:
            check_clone_url(clone_url)


def check_repository_name(name: str) -> None:
    """Raise InvalidInputError unless `name` is `owner/repository` of harmless characters."""
    if not _NAME.fullmatch(name) or name.endswith(".git"):
        raise InvalidInputError(
            f"{name[:200]!r} is not a repository's name: owner/repository, as GitHub allows"
        )


def check_clone_url(url: str) -> None:
    """Raise InvalidInputError unless git may fetch from `url`: https, http or file, no credentials in it.

    `file` reaches whatever the server's user may read: registering is for administrators.
    """
    try:
        parts = urlsplit(url)
        credentials = parts.username is not None or parts.password is not None
    except ValueError:
        raise InvalidInputError("the clone URL is not a URL") from None
    if parts.scheme not in _CLONE_SCHEMES or not parts.path or re.search(r"[\x00-\x20\x7f]", url):
        raise InvalidInputError(f"clone URLs start with {', '.join(sorted(_CLONE_SCHEMES))}")
    if credentials:
        raise InvalidInputError(
            "the clone URL holds credentials: give them as a setting, where they stay secret"
        )


def _view(row: Repository) -> RepositoryView:
    return RepositoryView(
        name=row.name,
        forge=row.forge,
        default_branch=row.default_branch,
        clone_url=row.clone_url,
        enabled=row.enabled,
        created_at=row.created_at,
    )

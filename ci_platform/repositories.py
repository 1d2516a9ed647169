"""The repositories whose changes start runs."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast
from urllib.parse import urlsplit

from ci_platform.errors import ConflictError, InvalidInputError, NotFoundError
from ci_platform.model import RefState, Repository, Run
from ci_platform.store import Store, Transaction, col, folded
from dynflow.clock import Clock

# GitHub's own rules, which keep names harmless in paths and URLs as well.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}/(?!\.{1,2}$)[A-Za-z0-9_.-]{1,100}", re.ASCII)
_BRANCH = re.compile(r"(?![-/.])(?!.*(?:\.\.|//|@\{))[^\x00-\x20\x7f~^:?*\[\\]{1,255}(?<![/.])", re.ASCII)
# What git can fetch from without running a helper program of somebody else's choice (`ext::` does).
_CLONE_SCHEMES = frozenset({"https", "http", "file"})


@dataclass(frozen=True, slots=True)
class RepositoryView:
    """A registered repository. `clone_url` is None where the forge's own is used.

    `parent` is what it was forked from. Nobody pushes to one that is `read_only`. Its runs may have the repositories
    `reads` as submodules, with the credentials that the platform has for them.
    """

    name: str
    forge: str
    default_branch: str
    clone_url: str | None
    enabled: bool
    created_at: datetime
    read_only: bool = False
    parent: str | None = None
    reads: tuple[str, ...] = ()


class Repositories:
    """Registers repositories and finds them."""

    def __init__(self, store: Store, forges: Collection[str], clock: Clock) -> None:
        self._store, self._forges, self._clock = store, frozenset(forges), clock

    async def register(
        self,
        name: str,
        *,
        forge: str,
        default_branch: str = "main",
        clone_url: str | None = None,
        read_only: bool = False,
        parent: str | None = None,
    ) -> RepositoryView:
        """Register `owner/repository`. The same again answers the same.

        Raises InvalidInputError, or ConflictError if the name is taken with other settings.
        """
        check_repository_name(name)
        self._check(forge, default_branch, clone_url)
        values: dict[str, Any] = {
            "forge": forge,
            "default_branch": default_branch,
            "clone_url": clone_url,
            "read_only": read_only,
            "parent": parent,
            "created_at": self._clock.now(),
        }

        def insert(tx: Transaction) -> Repository:
            # Names differ by more than case: GitHub's do, and mirrors may lie on a file system that folds it.
            held = tx.first(Repository, folded(Repository.name) == name.lower())
            if held is None:
                return tx.add(Repository(name=name, **values))
            if held.deleted_at is not None and held.name == name:
                revived = {**values, "deleted_at": None, "enabled": True}
                tx.change(Repository, revived, col(Repository.name) == name)
                return cast("Repository", tx.get(Repository, name))
            if (held.name, held.forge, held.clone_url, held.parent) != (name, forge, clone_url, parent):
                raise ConflictError(
                    f"repository {held.name!r} is registered already, at forge {held.forge!r}"
                )
            return held

        return _view(await self._store.write(insert))

    async def claim(self, name: str) -> None:
        """Hold a free name, unseen, until it is registered. Raises InvalidInputError, ConflictError."""
        check_repository_name(name)
        now = self._clock.now()

        def insert(tx: Transaction) -> None:
            held = tx.first(Repository, folded(Repository.name) == name.lower())
            if held is None:
                tx.add(Repository(name=name, forge="local", created_at=now, deleted_at=now, enabled=False))
            elif held.deleted_at is None or held.name != name:
                raise ConflictError(f"the repository {held.name!r} exists already: choose another name")

        await self._store.write(insert)

    async def deleted(self) -> list[str]:
        """Return the names that were deleted, or are claimed."""
        gone = col(Repository.deleted_at).is_not(None)
        return [row.name for row in await self._store.read(lambda tx: tx.all(Repository, gone))]

    async def get(self, name: str) -> RepositoryView:
        """Return a repository. Raises NotFoundError."""
        row = await self._store.read(lambda tx: tx.first(Repository, *_named(name)))
        if row is None:
            raise _missing(name)
        return _view(row)

    async def list(self) -> list[RepositoryView]:
        """Return all repositories by name."""
        there = col(Repository.deleted_at).is_(None)
        rows = await self._store.read(lambda tx: tx.all(Repository, there, order=col(Repository.name)))
        return [_view(row) for row in rows]

    async def set_enabled(self, name: str, *, enabled: bool) -> RepositoryView:
        """Let a repository start runs, or not. Raises NotFoundError."""
        return await self.change(name, enabled=enabled)

    async def change(
        self,
        name: str,
        *,
        enabled: bool | None = None,
        read_only: bool | None = None,
        reads: Collection[str] | None = None,
    ) -> RepositoryView:
        """Set whether a repository starts runs, whether nobody may push to it, what its runs may read besides.

        Raises NotFoundError, for each of `reads` too.
        """
        others = None if reads is None else [(await self.get(other)).name for other in sorted(set(reads))]
        given = {"enabled": enabled, "read_only": read_only, "reads": others}
        values = {key: value for key, value in given.items() if value is not None}
        if values and not await self._store.write(lambda tx: tx.change(Repository, values, *_named(name))):
            raise _missing(name)
        return await self.get(name)

    async def forget(self, name: str) -> None:
        """Take a repository off the list; its name is free. Its runs keep their rows.

        Raises NotFoundError, and ConflictError while a run of it has not ended.
        """

        def mark(tx: Transaction) -> None:
            if tx.lock(Repository, *_named(name)) is None:
                raise _missing(name)
            unfinished = tx.first(Run, col(Run.repo) == name, col(Run.conclusion).is_(None))
            if unfinished is not None:
                raise ConflictError(f"run {unfinished.id} of {name!r} has not ended: cancel it first")
            gone = {"deleted_at": self._clock.now(), "enabled": False, "reads": []}
            tx.change(Repository, gone, *_named(name))
            tx.change(RefState, {"sha": None}, col(RefState.repo) == name)
            # Another repository may get the name: what was allowed of this one is not of that.
            for row in tx.all(Repository):
                if name in row.reads:
                    left = [other for other in row.reads if other != name]
                    tx.change(Repository, {"reads": left}, col(Repository.name) == row.name)

        await self._store.write(mark)

    def _check(self, forge: str, default_branch: str, clone_url: str | None) -> None:
        if forge not in self._forges:
            raise InvalidInputError(f"there is no forge {forge[:50]!r}: {', '.join(sorted(self._forges))}")
        if not _BRANCH.fullmatch(default_branch):
            raise InvalidInputError(f"{default_branch[:100]!r} cannot be a branch's name")
        if clone_url is not None:
            check_clone_url(clone_url)


def _named(name: str) -> tuple[Any, Any]:
    return col(Repository.name) == name, col(Repository.deleted_at).is_(None)


def _missing(name: str) -> NotFoundError:
    return NotFoundError(f"repository {name[:200]!r} is not registered here")


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
        read_only=row.read_only,
        parent=row.parent,
        reads=tuple(row.reads),
    )

"""Repositories of ours that are filled from a URL and kept like it: where they come from, and what is due.

What is due is a row, worked off by `ci_platform.refreshing`: what a crash cuts short is done at the next start.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

from ci_platform import git_commands
from ci_platform.encryption import Encryption
from ci_platform.errors import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
    UnauthorizedError,
)
from ci_platform.fetching import Remote
from ci_platform.mirroring import Shape
from ci_platform.model import ImportRow
from ci_platform.repositories import Repositories, check_clone_url
from ci_platform.settings import Settings
from ci_platform.store import Store, Transaction, col
from ci_platform.waking import Waker
from dynflow.clock import Clock

_LONGEST_SECRET = 4096
_HOOK_BYTES = 24
_LOOKED_AT = timedelta(minutes=10)
"""For so long, what is still said to be damaged is not looked at again: reading every object is work."""


@dataclass(frozen=True, slots=True)
class ImportView:
    """An import without its secrets. `state`: `waiting` (never filled), `ready`, `failed` (`last_error` says why).

    `due_at` is when it is refreshed next, None where nobody asked.
    """

    repo: str
    url: str
    username: str | None
    depth: int | None
    blobs: bool
    state: str
    due_at: datetime | None
    refreshed_at: datetime | None
    verified_at: datetime | None
    last_error: str | None


class Imports:
    """What is imported, and from where. `waker` is woken when something becomes due."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        repositories: Repositories,
        encryption: Encryption,
        allow_file: bool = False,
    ) -> None:
        self._store, self._clock, self._encryption = store, clock, encryption
        self._repositories, self._allow_file = repositories, allow_file
        self.waker = Waker(clock)

    @staticmethod
    def of(settings: Settings, store: Store, clock: Clock, repositories: Repositories) -> Imports:
        """Return those of a data folder."""
        return Imports(
            store,
            clock,
            repositories=repositories,
            encryption=Encryption(settings.data / "encryption.key"),
            allow_file=settings.allow_file_remotes,
        )

    async def start(
        self,
        repo: str,
        url: str,
        *,
        credentials: tuple[str, str] | None = None,
        shape: Shape | None = None,
    ) -> tuple[ImportView, str]:
        """Register a repository that is filled from `url`; return it with the secret that its webhook signs with.

        The same name and URL again give it other credentials, another shape and another secret. Raises
        InvalidInputError, or ConflictError where the name is taken by a repository that is no import of `url`.
        """
        check_clone_url(url)
        git_commands.check_url(url, allow_file=self._allow_file)
        hook = secrets.token_urlsafe(_HOOK_BYTES)
        row = self._row(repo, url, credentials, shape or Shape(), hook)
        if not await self.has(repo):
            await self._claim(repo)
        await self._repositories.register(repo, forge="local", read_only=True)
        await self._store.write(lambda tx: _put(tx, row))
        self.waker.wake()
        return await self.get(repo), hook

    def _row(
        self, repo: str, url: str, credentials: tuple[str, str] | None, shape: Shape, hook: str
    ) -> ImportRow:
        username, password = credentials or (None, None)
        if any(len(value or "") > _LONGEST_SECRET or "\n" in (value or "") for value in (username, password)):
            raise InvalidInputError("user and password are one line each, of 4,096 characters at most")
        sealed = None if password is None else self._encryption.seal(f"import {repo}", password)
        return ImportRow(
            repo=repo,
            url=url,
            username=username,
            sealed_password=sealed,
            sealed_hook=self._encryption.seal(f"hook {repo}", hook),
            depth=shape.depth,
            blobs=shape.blobs,
            due_at=self._clock.now(),
        )

    async def _claim(self, repo: str) -> None:
        with suppress(NotFoundError):
            await self._repositories.get(repo)
            raise ConflictError(f"the repository {repo!r} exists already: import to another name")

    async def has(self, repo: str) -> bool:
        """Whether the repository is an import."""
        return await self._store.read(lambda tx: tx.get(ImportRow, repo)) is not None

    async def get(self, repo: str) -> ImportView:
        """Return an import. Raises NotFoundError."""
        return _view(await self._find(repo))

    async def _find(self, repo: str) -> ImportRow:
        row = await self._store.read(lambda tx: tx.get(ImportRow, repo))
        if row is None:
            raise NotFoundError(f"{repo[:200]!r} is no import: it has nothing to be refreshed from")
        return row

    async def forget(self, repo: str) -> None:
        """Forget where a repository comes from, secrets included; nothing where it is no import."""
        await self._store.write(lambda tx: tx.remove(ImportRow, col(ImportRow.repo) == repo))

    async def refresh(self, repo: str, *, verify: bool = False) -> ImportView:
        """Have the repository brought to what its remote has now; `verify` also looks at every object here.

        Returns at once. Many calls while one refresh runs make one more.
        """
        values = {"due_at": self._clock.now(), "attempts": 0} | ({"verify": True} if verify else {})
        if not await self._store.write(lambda tx: tx.change(ImportRow, values, col(ImportRow.repo) == repo)):
            await self._find(repo)
        self.waker.wake()
        return await self.get(repo)

    async def suspect(self, repo: str) -> bool:
        """Have every object looked at, and the import fetched anew, because one is damaged.

        False where it is no import, or was looked at a moment ago and nothing was found.
        """
        row = await self._store.read(lambda tx: tx.get(ImportRow, repo))
        if row is None or (row.verified_at and self._clock.now() - row.verified_at < _LOOKED_AT):
            return False
        await self.refresh(repo, verify=True)
        return True

    async def receive(self, repo: str, headers: Mapping[str, str], body: bytes) -> ImportView:
        """Refresh because the remote says that something moved. Names of headers are in lower case.

        Signed as GitHub, Gitea and Forgejo do it, or with GitLab's token. Raises UnauthorizedError, also where
        there is no such import.
        """
        row = await self._store.read(lambda tx: tx.get(ImportRow, repo))
        hook = "" if row is None else self._encryption.open(f"hook {repo}", row.sealed_hook)
        expected = "sha256=" + hmac.new(hook.encode(), body, hashlib.sha256).hexdigest()
        signed = hmac.compare_digest(expected.encode(), headers.get("x-hub-signature-256", "").encode())
        token = hmac.compare_digest(hook.encode(), headers.get("x-gitlab-token", "").encode())
        if row is None or not (signed or token):
            raise UnauthorizedError(
                "the signature is missing or is not this body's: check the webhook's secret"
            )
        return await self.refresh(repo)

    async def remote(self, repo: str) -> Remote | None:
        """Return where the repository comes from, None where it is no import. Raises UnavailableError."""
        row = await self._store.read(lambda tx: tx.get(ImportRow, repo))
        return None if row is None else self.remote_of(row)

    def remote_of(self, row: ImportRow) -> Remote:
        """Return where an import's row says that it comes from."""
        if row.sealed_password is None:
            return Remote(row.url)
        password = self._encryption.open(f"import {row.repo}", row.sealed_password)
        return Remote(row.url, (row.username or "", password))


def _put(tx: Transaction, row: ImportRow) -> None:
    held = tx.get(ImportRow, row.repo)
    if held is None:
        tx.add(row)
        return
    if held.url != row.url:
        raise ConflictError(f"{row.repo!r} is an import of {held.url}: delete it first")
    names = ("username", "sealed_password", "sealed_hook", "depth", "blobs", "due_at")
    values = {name: getattr(row, name) for name in names} | {"attempts": 0}
    tx.change(ImportRow, values, col(ImportRow.repo) == row.repo)


def _view(row: ImportRow) -> ImportView:
    return ImportView(
        repo=row.repo,
        url=row.url,
        username=row.username,
        depth=row.depth,
        blobs=row.blobs,
        state=row.state,
        due_at=row.due_at,
        refreshed_at=row.refreshed_at,
        verified_at=row.verified_at,
        last_error=row.last_error,
    )

"""Gets files that LFS keeps from where their repository comes from, or from where its commit says."""

from __future__ import annotations

import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

import anyio
import anyio.to_thread

from ci_platform import full_disk, git_commands, lfs_client
from ci_platform.errors import FailedError, ForbiddenError, LimitExceededError, PlatformError
from ci_platform.fetching import Remote
from ci_platform.git_commands import GitError
from ci_platform.guarded import Guard, Way
from ci_platform.lfs_client import LfsClient
from ci_platform.lfs_pointers import Pointed, Pointer
from ci_platform.source import Source
from ci_platform.source.lfs_store import LfsStore

_FILE = ".lfsconfig"
_LARGEST_FILE = 64 * 1024
_AT_ONCE = 4
_WITHIN = 3600.0
"""Seconds for all files of a commit."""

_MORE = 64 << 20
"""Bytes beside the files themselves: requests, answers, TLS."""


@dataclass(frozen=True, slots=True)
class _Server:
    """Where files are asked for. `host` is that of a remote that an administrator named, at any address."""

    endpoint: str
    credentials: tuple[str, str] | None
    host: str | None


class LfsFetching:
    """Fetches what is missing in the source's store. `most` are the bytes that LFS may keep of one commit."""

    def __init__(
        self, source: Source, remote_of: Callable[[str], Awaitable[Remote | None]], guard: Guard, *, most: int
    ) -> None:
        self._source, self._remote_of, self._guard, self._most = source, remote_of, guard, most

    @property
    def _store(self) -> LfsStore:
        return self._source.lfs

    async def obtain(self, repo: str, sha: str, files: Sequence[Pointed], *, trusted: bool) -> None:
        """Have the files here. Raises LimitExceededError, FailedError, ForbiddenError, UnavailableError."""
        pointers = list(dict.fromkeys(each.pointer for each in files))
        if (total := sum(each.size for each in pointers)) > self._most:
            raise LimitExceededError(
                f"LFS keeps {total:,} bytes of the commit, more than {self._most:,} (setting max_lfs)"
            )
        missing = await anyio.to_thread.run_sync(lambda: self._store.missing(repo, pointers, trusted=trusted))
        if not missing:
            return
        remote, named = await self._remote_of(repo), await self._named(repo, sha)
        if named is None and remote is None and await self._source.exists(repo):
            await self._copy(repo, self._source.path(repo), missing, trusted=trusted)
        elif named is None and remote is not None and remote.url.startswith("file:"):
            await self._copy(repo, Path(unquote(urlsplit(remote.url).path)), missing, trusted=trusted)
        else:
            await self._fetch(repo, _server(repo, remote, named), missing, trusted=trusted)

    async def _named(self, repo: str, sha: str) -> str | None:
        """Return the server that the commit names, None where it names none."""
        content = await self._source.read_file(repo, sha, _FILE, limit=_LARGEST_FILE)
        try:
            found = dict(await git_commands.read_configuration(content)) if content else {}
        except GitError as error:
            raise FailedError(f"{_FILE} cannot be read: {error}") from None
        return found.get("lfs.url")

    async def _copy(self, repo: str, remote: Path, missing: Sequence[Pointer], *, trusted: bool) -> None:
        """Take files from a repository on this machine: our own, or one that an administrator named."""

        def copy(pointer: Pointer) -> None:
            inside = Path("lfs", "objects", pointer.oid[:2], pointer.oid[2:4], pointer.oid)
            found = [path for path in (remote / inside, remote / ".git" / inside) if path.is_file()]
            if not found:
                raise FailedError(
                    f"{repo!r}, or its remote, has no LFS file {pointer.oid}: git lfs push --all"
                )
            with found[0].open("rb") as content:
                self._store.put(
                    repo, pointer, lambda into: shutil.copyfileobj(content, into), trusted=trusted
                )

        for pointer in missing:
            await anyio.to_thread.run_sync(full_disk.told(partial(copy, pointer)))

    async def _fetch(self, repo: str, server: _Server, missing: Sequence[Pointer], *, trusted: bool) -> None:
        most = sum(each.size for each in missing) + _MORE
        also = [server.host] if server.host else []
        async with self._guard.open(trusted=trusted, also=also, most=most) as way:
            client = LfsClient(server.endpoint, server.credentials, way.port, time.monotonic() + _WITHIN)
            for first in range(0, len(missing), lfs_client.AT_ONCE):
                batch = missing[first : first + lfs_client.AT_ONCE]
                await self._fetch_batch(repo, client, way, batch, trusted=trusted)

    async def _fetch_batch(
        self, repo: str, client: LfsClient, way: Way, batch: Sequence[Pointer], *, trusted: bool
    ) -> None:
        limiter = anyio.CapacityLimiter(_AT_ONCE)

        async def get(pointer: Pointer) -> None:
            def put() -> None:
                place = places[pointer.oid]
                self._store.put(repo, pointer, lambda into: client.get(place, pointer, into), trusted=trusted)

            # Who is cancelled closes the way out, which ends the thread.
            await anyio.to_thread.run_sync(full_disk.told(put), limiter=limiter, abandon_on_cancel=True)

        try:
            places = await anyio.to_thread.run_sync(client.places, batch, abandon_on_cancel=True)
            async with anyio.create_task_group() as tasks:
                for pointer in batch:
                    tasks.start_soon(get, pointer)
        except* PlatformError as errors:
            if refused := await way.refusals():
                raise ForbiddenError(f"LFS files of {repo!r}: {'; '.join(refused)}") from None
            raise _first(errors) from None


def _first(errors: BaseExceptionGroup[PlatformError]) -> PlatformError:
    found: BaseException = errors
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, PlatformError)  # noqa: S101 - all of the group are
    return found


def _server(repo: str, remote: Remote | None, named: str | None) -> _Server:
    """Return whom to ask. Credentials go to the repository's own server, which no commit can name another for."""
    own = None
    if remote is not None and remote.url.startswith(("http:", "https:")):
        own = remote.url.rstrip("/")
        own += "/info/lfs" if own.endswith(".git") else ".git/info/lfs"
    endpoint = (lfs_client.check(named).rstrip("/") if named else None) or own
    if endpoint is None:
        raise FailedError(f"{repo!r} has no remote that LFS files could come from, and no lfs.url in {_FILE}")
    if remote is None or endpoint != own:
        return _Server(endpoint, None, None)
    parts = urlsplit(endpoint)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return _Server(
        endpoint, remote.credentials, f"{host}:{parts.port or {'http': 80, 'https': 443}[parts.scheme]}"
    )

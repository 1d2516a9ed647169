"""Repositories as they are read: what is not here, or damaged, is fetched from where it comes from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import pygit2

from ci_platform import git_commands
from ci_platform.cones import Cone
from ci_platform.errors import (
    FailedError,
    InvalidInputError,
    MissingObjectError,
    NotFoundError,
    UnavailableError,
)
from ci_platform.fetching import Fetch, Remote
from ci_platform.lfs_pointers import Pointed
from ci_platform.mirroring import DAMAGED, PARTIAL, Mirror, damage
from ci_platform.source import folders, lfs_layers, objects
from ci_platform.source.objects import check_sha
from ci_platform.source.places import Places, Read, read_and_close
from pipelines.contract import Commit, CommitInfo, TreeEntry

T = TypeVar("T")

RemoteOf = Callable[[str], Awaitable[Remote | None]]
"""Where a repository can be fetched from; None where it is our own, or not known."""

OnDamage = Callable[[str], Awaitable[bool]]
"""Told of a repository of our own that has a damaged object; whether it is going to be mended."""

Need = Callable[[pygit2.Repository], Iterable[bytes]]
"""The files, by their ids, that a reader is going to read."""


async def _nowhere(_repo: str) -> Remote | None:
    return None


async def _helpless(_repo: str) -> bool:
    return False


class Reading(Places):
    """Fetches and reads. Mirrors of forges get single commits; partial imports get files when they are first read."""

    def __init__(
        self,
        root: Path,
        *,
        within: timedelta,
        threads: int,
        allow_file: bool,
        remote_of: RemoteOf | None,
        on_damage: OnDamage | None,
        look_only: bool,
    ) -> None:
        super().__init__(root, within=within, threads=threads, look_only=look_only)
        self._allow_file, self._remote_of = allow_file, remote_of or _nowhere
        self._on_damage = on_damage or _helpless

    # Fetching

    async def has(self, repo: str, sha: str) -> bool:
        """Whether the commit is here already."""
        return await self._thread(lambda: self._has(repo, sha))

    def _has(self, repo: str, sha: str) -> bool:
        try:
            return self._with(repo, lambda opened: check_sha(sha) in opened)
        except NotFoundError:
            return False
        except pygit2.GitError:  # damaged: who reads it learns that, and fetches it anew
            return True

    async def fetch(self, repo: str, sha: str, remote: Remote, *, ref: str | None = None) -> None:
        """Make sure that the commit is here, fetching as little as the remote allows; about 1 ms where it is.

        `ref` is where the remote should have it, for servers that give no commit by its id. Raises FailedError
        where the remote has no such commit, UnavailableError where it cannot be reached in time.
        """
        self._used(repo)
        if await self.has(repo, sha):
            return
        if await self.exists(repo):
            raise FailedError(f"{repo!r} is our own and has no commit {sha}")
        git_commands.check_url(remote.url, allow_file=self._allow_file)
        if ref is not None and not objects.is_ref(ref):
            raise InvalidInputError(f"not the full name of a ref: {ref[:100]!r}")
        async with self.writing(repo):
            if not await self.has(repo, sha):
                path, within = self.path(repo), self._within
                get = Fetch(path, repo, sha, ref, remote, self.protocols, within)
                await self._thread(lambda: folders.initialise(path, "main"))
                try:
                    await get(lambda: self.has(repo, sha))
                except UnavailableError as error:
                    if not DAMAGED.search(str(error)) or await damage(path, within) is None:
                        raise
                    await self._discard(repo)
                    await self._thread(lambda: folders.initialise(path, "main"))
                    await get(lambda: self.has(repo, sha))

    @property
    def protocols(self) -> str:
        """The transports that git may fetch by, separated by colons."""
        return "file:http:https" if self._allow_file else "http:https"

    # Refs

    async def default_branch(self, repo: str) -> str:
        """Return the branch that HEAD names, which need not exist yet."""
        return await self._thread(lambda: self._with(repo, objects.head))

    async def branches(self, repo: str) -> dict[str, str]:
        """Return branch -> commit id."""
        refs = await self.ref_snapshot(repo)
        prefix = "refs/heads/"
        return {ref.removeprefix(prefix): sha for ref, sha in refs.items() if ref.startswith(prefix)}

    async def ref_snapshot(self, repo: str) -> dict[str, str]:
        """Return branch and tag refs by full name, with the commits they lead to."""
        return await self._thread(lambda: self._with(repo, objects.refs))

    async def refs_at(self, path: Path) -> dict[str, str]:
        """Return the refs of a repository that has no name yet, as `ref_snapshot` does."""
        return await self._thread(lambda: read_and_close(pygit2.Repository(str(path)), objects.refs))

    async def settle_default_branch(self, repo: str) -> None:
        """Let HEAD name the only branch, where the one it names does not exist."""
        branches, head = await self.branches(repo), await self.default_branch(repo)
        if len(branches) == 1 and head not in branches:
            (only,) = branches
            await self._thread(lambda: self._with(repo, lambda opened: opened.set_head(f"refs/heads/{only}")))

    # Reading

    async def _read(
        self,
        repo: str,
        sha: str,
        read: Read[T],
        *,
        fetch: bool = True,
        building: bool = False,
        need: Need | None = None,
    ) -> T:
        """Read of a commit; where something is not here that its remote has, fetch that and read once more.

        Without `fetch` a commit that is not here is not fetched, but what is missing or damaged of one that is. A
        partial import gets all that it misses of what the reader needs at once: without `need`, all of the commit.
        `building`: nobody else builds trees of the repository meanwhile, but for while it is fetched, since who packs
        it keeps writers out first, and then waits for builders.
        """

        async def attempt() -> T:
            async with self._builds(repo) if building else nullcontext():
                return await self._thread(lambda: self._with(repo, read))

        try:
            return await attempt()
        except (MissingObjectError, NotFoundError) as error:
            damaged = isinstance(error, MissingObjectError)
            if not (fetch or damaged) or not await self._recover(repo, sha, need, damaged=damaged):
                raise
        return await attempt()

    async def _recover(self, repo: str, sha: str, need: Need | None = None, *, damaged: bool) -> bool:
        """Fetch what a partial import or a damaged mirror has not of a commit; return whether anything was done."""
        remote = await self._remote_of(repo)
        if remote is None:
            return False
        if await self.exists(repo):
            mirror = Mirror(self.path(repo), remote, self.protocols, self._within)
            if mirror.is_partial and await self._hydrate(mirror, repo, sha, need):
                return True
            if damaged and await self._on_damage(repo):
                raise UnavailableError(f"{repo!r} has a damaged object, and is being fetched anew: try again")
            return False
        if damaged:
            async with self._alone(repo), self._builds(repo):
                await self._discard(repo)
        await self.fetch(repo, sha, remote)
        return True

    async def _hydrate(self, mirror: Mirror, repo: str, sha: str, need: Need | None) -> bool:
        """Fetch files in one go; return whether any were missing."""
        async with self.writing(repo):
            try:
                if need is None:
                    return await mirror.hydrate(f"{sha}^{{tree}}") > 0
                missing = await self._thread(
                    lambda: self._with(repo, lambda opened: objects.missing(opened, need(opened)))
                )
                await mirror.bring(missing)
                return bool(missing)
            except MissingObjectError:
                return False  # a folder, of which none is ever left out
            except git_commands.GitError as error:
                if DAMAGED.search(str(error)):
                    return False
                raise UnavailableError(f"files of {sha} of {repo!r} cannot be fetched: {error}") from None

    async def resolve(self, repo: str, ref: str) -> str:
        """Return the commit id of a branch, a tag, a full ref or a full id; NotFoundError if there is none."""
        return await self._thread(lambda: self._with(repo, lambda opened: objects.resolve(opened, repo, ref)))

    async def commit(self, repo: str, sha: str) -> CommitInfo:
        """Return what people see of a commit."""
        return await self._read(
            repo, sha, lambda opened: objects.info(objects.commit(opened, repo, sha)), fetch=False
        )

    async def commit_title(self, repo: str, sha: str) -> str:
        """Return the first line of a commit's message."""
        return (await self.commit(repo, sha)).title

    async def commit_message(self, repo: str, sha: str) -> str:
        """Return a commit's whole message."""
        return (await self.read_commit(repo, sha)).message

    async def read_commit(self, repo: str, sha: str, *, fetch: bool = False) -> Commit:
        """Return a whole commit. With `fetch` it comes from the repository's remote, where it is not here."""
        return await self._read(
            repo, sha, lambda opened: objects.whole(objects.commit(opened, repo, sha)), fetch=fetch
        )

    async def log(
        self, repo: str, ref: str, *, limit: int = 50, skip: int = 0, fetch: bool = False
    ) -> list[CommitInfo]:
        """Return the commits that a ref or commit leads to, the newest first; up to 1,000, after `skip` others.

        They end where what is here of history ends. See `read_commit` for `fetch`.
        """
        start = ref if objects.is_sha(ref) else await self.resolve(repo, ref)
        return await self._read(
            repo, start, lambda opened: objects.log(opened, repo, start, limit=limit, skip=skip), fetch=fetch
        )

    async def read_tree(
        self,
        repo: str,
        sha: str,
        path: str = "",
        *,
        limit: int = objects.MOST_LISTED,
        skip: int = 0,
        fetch: bool = False,
    ) -> list[TreeEntry]:
        """Return what a folder of a commit holds, in git's order, after `skip` others; NotFoundError without one.

        See `read_commit` for `fetch`.
        """
        return await self._read(
            repo,
            sha,
            lambda opened: objects.read_tree(opened, repo, sha, path, limit=limit, skip=skip),
            fetch=fetch,
        )

    async def read_file(self, repo: str, sha: str, path: str, *, limit: int = 1 << 20) -> bytes | None:
        """Return a regular file of a commit, None where there is none; LimitExceededError above `limit` bytes."""
        return await self._read(
            repo,
            sha,
            lambda opened: objects.read_file(opened, repo, sha, path, limit),
            need=lambda opened: objects.blobs_at(opened, repo, sha, path),
        )

    async def read_folder(
        self, repo: str, sha: str, path: str, *, suffix: str = "", limit: int = 4 << 20
    ) -> dict[str, bytes]:
        """Return the regular files below a folder by their path in it; empty where there is no such folder.

        LimitExceededError where they have more than `limit` bytes together, or are more than 1,000.
        """
        return await self._read(
            repo,
            sha,
            lambda opened: objects.read_folder(opened, repo, sha, path, suffix=suffix, limit=limit),
            need=lambda opened: objects.blobs_at(opened, repo, sha, path, suffix),
        )

    async def links(self, repo: str, sha: str, paths: Collection[str]) -> dict[str, str]:
        """Return which of some paths of a commit are submodules, with their commits."""
        return await self._read(repo, sha, lambda opened: objects.links(opened, repo, sha, paths))

    async def complete(self, repo: str, sha: str) -> None:
        """Have all files of a commit here, where the repository is a partial import."""
        if await self.exists(repo) and (self.path(repo) / PARTIAL).exists():
            await self._recover(repo, sha, damaged=False)

    async def pointed(self, repo: str, sha: str, cone: Cone | None) -> list[Pointed]:
        """Return the files of a commit that LFS keeps."""
        return await self._read(
            repo,
            sha,
            lambda opened: lfs_layers.pointed(opened, repo, sha, cone),
            need=lambda opened: objects.blobs_of(opened, repo, sha, cone),
        )

"""Where repositories are, and who may write to them: made, forked, packed, deleted, repaired after a kill."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
import pygit2

from ci_platform import full_disk, git_commands, layers
from ci_platform.errors import (
    ConflictError,
    FailedError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from ci_platform.mirroring import promised
from ci_platform.named_locks import NamedLocks
from ci_platform.source import folders, objects
from ci_platform.source.folders import Held
from ci_platform.source.names import check_repo, module_mirrors

T = TypeVar("T")


Read = Callable[[pygit2.Repository], T]


def read_and_close(opened: pygit2.Repository, read: Read[T]) -> T:
    """Return what `read` returns, and close the repository.

    pygit2's repositories refer to themselves: otherwise they keep their packs open until garbage is collected, and
    libgit2 takes a pack of the same path for the same pack, also where a damaged one was replaced meanwhile.
    """
    try:
        return read(opened)
    finally:
        opened.free()


class Places:
    """The folders of repositories: `git/` has those that we serve, `mirrors/` those of forges.

    One writer at a time for each, any number of readers. Blocking work is done in threads of its own limiter.
    """

    def __init__(self, root: Path, *, within: timedelta, threads: int, look_only: bool) -> None:
        self._root, self._within = root, within
        if not look_only:
            for name in ("git", "mirrors"):
                (root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        self._trash = root / "trash"
        self._journal = folders.Journal(root / "writing")
        self._limiter = anyio.CapacityLimiter(threads)
        self._writers, self._builds, self._upkeep = NamedLocks(), NamedLocks(), NamedLocks()
        self._written: set[str] = set()
        self._measuring, self._sizes = anyio.Lock(), folders.Sizes()
        objects.isolate_libgit2()

    async def _thread(self, function: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(full_disk.told(function), limiter=self._limiter)

    def _served(self, repo: str) -> Path:
        return self._root / "git" / f"{check_repo(repo)}.git"

    def _mirrored(self, repo: str) -> Path:
        return self._root / "mirrors" / f"{repo}.git"

    def path(self, repo: str) -> Path:
        """Return the repository's folder: the one that is served if there is one, else the mirror's."""
        served = self._served(repo)
        return served if served.is_dir() else self._mirrored(repo)

    def _used(self, repo: str) -> None:
        """Note that a mirror is in use."""
        with suppress(OSError):
            os.utime(self._mirrored(check_repo(repo)))

    async def mirrors(self) -> list[Held]:
        """Return the mirrors on disk, with what they take and when they were used last."""
        async with self._measuring:
            return await self._thread(lambda: self._sizes.held(self._root / "mirrors"))

    async def _discard(self, repo: str) -> None:
        await self._thread(partial(folders.discard, self._mirrored(repo), self._trash))

    async def tree_ids(self, commits: Collection[tuple[str, str]]) -> set[tuple[str, str]]:
        """Return (repository, tree id) for each (repository, commit id) that is here."""
        return await self._thread(lambda: {found for each in commits if (found := self._tree_id(*each))})

    def _tree_id(self, repo: str, sha: str) -> tuple[str, str] | None:
        try:
            opened = self._open(repo)
            return repo, read_and_close(opened, lambda it: str(objects.commit(it, repo, sha).tree_id))
        except (NotFoundError, FailedError, pygit2.GitError):
            return None

    async def remove_mirror(self, repo: str, used_before: float) -> bool:
        """Remove a mirror, to be fetched again when it is needed; False where it was used since `used_before`."""
        path = self._mirrored(check_repo(repo))
        async with self._alone(repo), self._builds(repo):
            if not await self._thread(lambda: folders.used_before(path, used_before)):
                return False
            await self._discard(repo)
        return True

    def _open(self, repo: str) -> pygit2.Repository:
        path = self.path(repo)
        try:
            return pygit2.Repository(str(path), pygit2.enums.RepositoryOpenFlag.NO_SEARCH)
        except pygit2.GitError:
            raise NotFoundError(f"there is no repository {repo!r}") from None

    def _with(self, repo: str, read: Read[T]) -> T:
        """Open a repository, read of it, close it."""
        return read_and_close(self._open(repo), read)

    @asynccontextmanager
    async def writing(self, repo: str) -> AsyncIterator[None]:
        """Be the only one who writes to the repository, for the time of the block.

        Where that fails or is cancelled, what git left locked is unlocked; where this process dies, the next one
        does so at its start.
        """
        async with self._alone(repo):
            self._written.add(repo)
            yield

    @asynccontextmanager
    async def _alone(self, repo: str) -> AsyncIterator[None]:
        async with self._writers(repo):
            with self._journal.entry(check_repo(repo)):
                try:
                    yield
                except BaseException:
                    with anyio.CancelScope(shield=True):
                        await self._thread(lambda: folders.unlock(self.path(repo)))
                    raise

    def look_again(self, repo: str) -> None:
        """Have the next start look at the repository: what was written to it could not be told on."""
        self._journal.keep(check_repo(repo))

    async def create(self, repo: str, *, default_branch: str = "main") -> None:
        """Create an empty repository that is served; ConflictError if it exists."""
        if not objects.is_ref(f"refs/heads/{default_branch}"):
            raise InvalidInputError(f"no branch can be named {default_branch[:100]!r}")
        path = self._served(repo)
        if path.exists():
            raise ConflictError(f"the repository {repo!r} exists already")
        await self._thread(lambda: folders.initialise(path, default_branch))

    async def fork(self, parent: str, repo: str) -> None:
        """Make a repository of our own with the branches, tags and commits of another one of our own.

        Objects are shared on disk, so it takes milliseconds; whatever happens to one of the two later does not
        concern the other. NotFoundError for the parent, ConflictError if `repo` exists.
        """
        source, target = self._served(parent), self._served(repo)
        if not source.is_dir():
            raise NotFoundError(f"there is no repository {parent!r} to fork")
        if target.exists():
            raise ConflictError(f"the repository {repo!r} exists already")
        async with AsyncExitStack() as held:
            # Refs are read before packs are listed: what they lead to is in these packs, unless packs are taken
            # away meanwhile, or a boundary of history is moved.
            if (source / "shallow").exists():  # in the order in which whoever packs it holds both
                await held.enter_async_context(self._writers(parent))
            await held.enter_async_context(self._upkeep(parent))
            await self._thread(lambda: self._fork(parent, target))

    def _fork(self, parent: str, target: Path) -> None:
        refs, head = self._with(parent, lambda opened: (objects.own_refs(opened), objects.head(opened)))
        folders.fork(self._served(parent), target, refs, head)

    @asynccontextmanager
    async def making(self, repo: str) -> AsyncIterator[Path]:
        """Yield an empty repository, which has its name after the block, in the place of any other.

        Where the block fails nothing changes. Use it inside of `writing`.
        """
        path, trash = self._served(repo), self._trash
        scratch = await self._thread(lambda: folders.prepare(path, "main"))
        try:
            yield scratch
            with anyio.CancelScope(shield=True):
                await self._thread(lambda: folders.replace(scratch, path, trash))
        finally:
            with anyio.CancelScope(shield=True):
                await self._thread(lambda: layers.remove_tree(scratch))

    async def delete(self, repo: str) -> None:
        """Remove a repository or mirror; nothing where there is none. Who reads it now may get an error.

        Trees that are being built of it, and of its submodules, are finished first.
        """
        paths = [self._served(repo), self._mirrored(repo)]
        paths += [self._root / of / name for of in ("mirrors", "lfs") for name in module_mirrors(repo)]
        async with self._writers(repo), self._builds(repo):
            for path in paths:
                await self._thread(partial(folders.discard, path, self._trash))

    async def exists(self, repo: str) -> bool:
        """Whether the repository is one of our own."""
        return self._served(repo).is_dir()

    async def repositories(self) -> list[str]:
        """Return the names of our own repositories, sorted."""
        return await self._thread(lambda: folders.served(self._root / "git"))

    async def maintain(self) -> None:
        """Pack what was written to since the last call, where that left it in many pieces.

        Nothing is dropped, and large packs that forks share stay shared. UnavailableError where one cannot be
        packed; it is tried again when it is written to.
        """
        while self._written:
            await self._maintain(self._written.pop())

    async def _maintain(self, repo: str) -> None:
        path = self.path(repo)
        if not await self._thread(lambda: folders.needs_packing(path)):
            return
        async with self._alone(repo), self._builds(repo), self._upkeep(repo):
            command = ["--git-dir", str(path), "repack", "-a", "-d", "--keep-unreachable", "--quiet"]
            shared = await self._thread(lambda: folders.shared_packs(path))
            command += [f"--keep-pack={name}" for name in shared]
            try:
                await git_commands.run(command, git_commands.environment(promised(path)), within=self._within)
            except git_commands.GitError as error:
                raise UnavailableError(f"{repo!r} cannot be packed: {error}") from None

    def _repair(self) -> set[str]:
        """Remove what a killed process left; return our own repositories that it was writing to."""
        for folder in ("git", "mirrors"):
            folders.sweep(self._root / folder, self._trash)
        found = self._journal.read()
        if self._journal.is_new:
            found |= {name for each in ("git", "mirrors") for name in folders.served(self._root / each)}
        for repo in found:
            for folder in ("git", "mirrors"):
                folders.unlock(self._root / folder / f"{check_repo(repo)}.git")
        return {repo for repo in found if self._served(repo).is_dir()}

    async def reconciled(self) -> None:
        """Forget what `sweep` returned."""
        await self._thread(self._journal.forget)

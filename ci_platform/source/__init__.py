"""Repositories: mirrors of remote ones, the ones we serve ourselves, and the trees of their commits.

The only importer of pygit2 next to `forges.local`. Everything blocking runs in threads of its own limiter. Where
libgit2 is the wrong tool (fetching, serving) the `git` program is used through `ci_platform.git_commands`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
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
from ci_platform.sandboxes import SANDBOX_UID
from ci_platform.source import folders, lfs_layers, objects
from ci_platform.source.checkouts import Checkout, Checkouts
from ci_platform.source.grafted import ModuleTrees
from ci_platform.source.lfs_layers import LfsTrees
from ci_platform.source.lfs_store import LfsStore
from ci_platform.source.names import check_repo
from ci_platform.source.objects import check_sha
from ci_platform.source.places import Places, Read, read_and_close
from ci_platform.submodules import Module
from ci_platform.tree_store import StoredTree, TreeStore
from ci_platform.trees import Owner, TreeLimits
from ci_platform.workspace_git import GitFolder
from pipelines.contract import Commit, CommitInfo, TreeEntry

__all__ = [
    "Checkout",
    "Commit",
    "CommitInfo",
    "GitFolder",
    "Remote",
    "Source",
    "TreeEntry",
    "check_repo",
    "check_sha",
]

T = TypeVar("T")

RemoteOf = Callable[[str], Awaitable[Remote | None]]
"""Where a repository can be fetched from; None where it is our own, or not known."""


async def _nowhere(_repo: str) -> Remote | None:
    return None


class Source(Places):
    """All repositories below one folder: `git/` is served, `mirrors/` is fetched, `trees/` are commits on disk.

    *Concurrency*: one event loop; one writer and one tree at a time per repository, any number of readers.
    *Idempotency*: everything but `create` and `fork`. *Cancellation*: git is killed, and what it left is tidied;
    work in threads ends first. *Errors*: InvalidInputError for names no repository can have, NotFoundError,
    FailedError where the repository is at fault, UnavailableError where a remote is.
    """

    def __init__(
        self,
        root: Path,
        *,
        allow_file: bool = False,
        limits: TreeLimits | None = None,
        fetch_within: timedelta = timedelta(minutes=10),
        threads: int = 4,
        remote_of: RemoteOf | None = None,
    ) -> None:
        super().__init__(root, within=fetch_within, threads=threads)
        self._allow_file, self._remote_of = allow_file, remote_of or _nowhere
        owner = Owner.of_sandboxes(SANDBOX_UID)
        self._trees = TreeStore(root / "trees", owner)
        self._checkouts = Checkouts(self._trees, owner, limits or TreeLimits())
        self.lfs, self._lfs_trees = LfsStore(root / "lfs", owner), LfsTrees(self._trees, owner)
        self._modules = ModuleTrees(self._trees, owner, limits or TreeLimits(), self._with)

    async def environment(self, repo: str, settings: Mapping[str, str]) -> dict[str, str]:
        """Return the environment in which git serves a repository of our own.

        It may fetch in there for a partial import alone, and from where that comes from.
        """
        mirror = Mirror(self.path(repo), Remote(""), self.protocols, self._within)
        if mirror.is_partial and (remote := await self._remote_of(repo)) is not None:
            return replace(mirror, remote=remote).environment(settings)
        return git_commands.environment(settings)

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
        self, repo: str, sha: str, read: Read[T], *, fetch: bool = True, building: bool = False
    ) -> T:
        """Read of a commit; where something is not here that its remote has, fetch that and read once more.

        Without `fetch` a commit that is not here is not fetched, but what is missing or damaged of one that is.
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
            if not (fetch or damaged) or not await self._recover(repo, sha, damaged=damaged):
                raise
        return await attempt()

    async def _recover(self, repo: str, sha: str, *, damaged: bool) -> bool:
        """Fetch what a partial import or a damaged mirror has not of a commit; return whether anything was done."""
        remote = await self._remote_of(repo)
        if remote is None:
            return False
        if await self.exists(repo):
            mirror = Mirror(self.path(repo), remote, self.protocols, self._within)
            return mirror.is_partial and await self._hydrate(mirror, repo, sha)
        if damaged:
            async with self._alone(repo), self._builds(repo):
                await self._discard(repo)
        await self.fetch(repo, sha, remote)
        return True

    async def _hydrate(self, mirror: Mirror, repo: str, sha: str) -> bool:
        async with self.writing(repo):
            try:
                return await mirror.hydrate(f"{sha}^{{tree}}") > 0
            except git_commands.GitError as error:
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
        return await self._read(repo, sha, lambda opened: objects.read_file(opened, repo, sha, path, limit))

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
        )

    # Trees

    async def materialise(self, repo: str, sha: str) -> tuple[Path, ...]:
        """Return the commit's files on disk: layers, topmost first, the last one a whole tree.

        They belong to the sandboxes' uid and are never written to again. A commit close to one that is on disk
        costs its difference. NotFoundError where the commit is not here (`fetch` first).
        """
        check_sha(sha)
        return await self._read(
            repo, sha, lambda opened: self._checkouts.materialise(repo, opened, sha), building=True
        )

    async def checkout(self, repo: str, folder: GitFolder, git: str | None = None) -> Checkout:
        """Return the commit's files as `materialise` does, and on top of them a `.git`.

        `git` is that of an earlier checkout of the same commit, which is taken as long as it is here.
        """
        check_sha(folder.sha)
        self._used(repo)

        def build(opened: pygit2.Repository) -> Checkout:
            return self._checkouts.with_git(repo, opened, folder, git)

        return await self._read(repo, folder.sha, build, building=True)

    async def links(self, repo: str, sha: str, paths: Collection[str]) -> dict[str, str]:
        """Return which of some paths of a commit are submodules, with their commits."""
        return await self._read(repo, sha, lambda opened: objects.links(opened, repo, sha, paths))

    async def complete(self, repo: str, sha: str) -> None:
        """Have all files of a commit here, where the repository is a partial import."""
        if await self.exists(repo) and (self.path(repo) / PARTIAL).exists():
            await self._recover(repo, sha, damaged=False)

    async def module_layer(
        self, repo: str, modules: Sequence[Module], folder: GitFolder, config: str
    ) -> Path:
        """Return a layer with the files of submodules, whose commits are here, and their `.git`."""
        for each in modules:
            self._used(each.store)
        async with AsyncExitStack() as held:
            # In one order, whoever holds some of them meanwhile: nothing may pack what is read.
            for name in sorted({repo, *(module.store for module in modules)}):
                await held.enter_async_context(self._builds(name))
            return await self._thread(lambda: self._modules.layer(repo, modules, folder, config))

    async def pointed(self, repo: str, sha: str, cone: Cone | None) -> list[Pointed]:
        """Return the files of a commit that LFS keeps."""
        return await self._read(repo, sha, lambda opened: lfs_layers.pointed(opened, repo, sha, cone))

    async def lfs_layer(
        self, repo: str, folder: GitFolder, config: str, files: Sequence[Pointed] | None = None
    ) -> Path | None:
        """Return the layer with these files, which are in `lfs`; without `files` that which is here, or None."""
        trusted = not folder.alone
        told = f"{config}\n{trusted}"

        def make(opened: pygit2.Repository) -> Path | None:
            oid = objects.commit(opened, repo, folder.sha).tree_id
            below = self._checkouts.tree(repo, opened, oid, folder.cone)
            if files is None:
                return self._lfs_trees.find(repo, below, told)
            paths = partial(self.lfs.path, repo, trusted=trusted)
            return self._lfs_trees.build(repo, below, told, files, config, paths)

        async with self._builds(repo):
            return await self._read(repo, folder.sha, make)

    # Garbage

    async def trees(self) -> list[tuple[str, StoredTree]]:
        """Return the trees on disk with their repositories."""
        return await self._thread(self._trees.all)

    async def remove_tree(self, repo: str, key: str) -> bool:
        """Remove a tree that nobody uses; False where it is safe by now, see `TreeStore.remove`."""
        async with self._builds(repo):
            return await self._thread(lambda: self._trees.remove(repo, key))

    async def sweep(self) -> set[str]:
        """Repair what a killed process left half done, and end what it left running. Call once at start.

        Returns our own repositories that may have changed without anybody being told; call `reconciled` when
        everybody is.
        """
        await self._thread(git_commands.end_orphans)
        await self._thread(self._trees.sweep)
        await self._thread(self.lfs.sweep)
        return await self._thread(self._repair)

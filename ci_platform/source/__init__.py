"""Repositories: mirrors of remote ones, the ones we serve ourselves, and the trees of their commits.

The only importer of pygit2 next to `forges.local`. Everything blocking runs in threads of its own limiter. Where
libgit2 is the wrong tool (fetching, serving) the `git` program is used through `ci_platform.git_commands`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
import pygit2

from ci_platform import commit_trees, git_commands, layers
from ci_platform.errors import ConflictError, FailedError, InvalidInputError, NotFoundError, UnavailableError
from ci_platform.fetching import Fetch, Remote
from ci_platform.named_locks import NamedLocks
from ci_platform.sandboxes import SANDBOX_UID
from ci_platform.source import folders, objects
from ci_platform.source.objects import Commit, CommitInfo, Objects, TreeEntry, check_sha
from ci_platform.trees import Owner, TreeLimits, TreeStore, TreeWriter

__all__ = ["Commit", "CommitInfo", "Remote", "Source", "TreeEntry", "check_repo", "check_sha"]

T = TypeVar("T")

_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}/[A-Za-z0-9_.-]{1,100}")
_DELTA_LIMIT = 1000
"""Paths above which a new base costs less than a delta (measured: 1,000 paths take about 250 ms)."""

_BASES_TRIED = 3


def check_repo(repo: str) -> str:
    """Return the name if it is `owner/name` and safe as a path; InvalidInputError otherwise."""
    if not _REPO.fullmatch(repo) or repo.endswith((".git", ".lock", "/.", "/..")):
        raise InvalidInputError(f"a repository is named like 'owner/name', got {repo[:100]!r}")
    return repo


class Source:
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
    ) -> None:
        self._root, self._allow_file, self._fetch_within = root, allow_file, fetch_within
        for name in ("git", "mirrors"):
            (root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        self._journal = folders.Journal(root / "writing")
        self._trees = TreeStore(root / "trees", Owner.of_sandboxes(SANDBOX_UID), limits or TreeLimits())
        self._limiter = anyio.CapacityLimiter(threads)
        self._writers, self._builds, self._upkeep = NamedLocks(), NamedLocks(), NamedLocks()
        self._written: set[str] = set()
        objects.isolate_libgit2()

    async def _thread(self, function: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(function, limiter=self._limiter)

    # Where things are

    def _served(self, repo: str) -> Path:
        return self._root / "git" / f"{check_repo(repo)}.git"

    def path(self, repo: str) -> Path:
        """Return the repository's folder: the one that is served if there is one, else the mirror's."""
        served = self._served(repo)
        return served if served.is_dir() else self._mirrored(repo)

    def _mirrored(self, repo: str) -> Path:
        return self._root / "mirrors" / f"{repo}.git"

    def _open(self, repo: str) -> pygit2.Repository:
        path = self.path(repo)
        try:
            return pygit2.Repository(str(path), pygit2.enums.RepositoryOpenFlag.NO_SEARCH)
        except pygit2.GitError:
            raise NotFoundError(f"there is no repository {repo!r}") from None

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

    # Fetching

    async def has(self, repo: str, sha: str) -> bool:
        """Whether the commit is here already."""
        return await self._thread(lambda: self._has(repo, sha))

    def _has(self, repo: str, sha: str) -> bool:
        try:
            return check_sha(sha) in self._open(repo)
        except NotFoundError:
            return False

    async def fetch(self, repo: str, sha: str, remote: Remote, *, ref: str | None = None) -> None:
        """Make sure that the commit is here, fetching as little as the remote allows; about 1 ms where it is.

        `ref` is where the remote should have it, for servers that give no commit by its id. Raises FailedError
        where the remote has no such commit, UnavailableError where it cannot be reached in time.
        """
        if await self.has(repo, sha):
            return
        if await self.exists(repo):
            raise FailedError(f"{repo!r} is our own and has no commit {sha}")
        git_commands.check_url(remote.url, allow_file=self._allow_file)
        if ref is not None and not objects.is_ref(ref):
            raise InvalidInputError(f"not the full name of a ref: {ref[:100]!r}")
        async with self.writing(repo):
            if not await self.has(repo, sha):
                path, within = self.path(repo), self._fetch_within
                await self._thread(lambda: folders.initialise(path, "main"))
                await Fetch(path, repo, sha, ref, remote, self.protocols, within)(lambda: self.has(repo, sha))

    @property
    def protocols(self) -> str:
        """The transports that git may fetch by, separated by colons."""
        return "file:http:https" if self._allow_file else "http:https"

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
                await git_commands.run(command, git_commands.environment(), within=self._fetch_within)
            except git_commands.GitError as error:
                raise UnavailableError(f"{repo!r} cannot be packed: {error}") from None

    # Repositories of our own

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
            await held.enter_async_context(self._upkeep(parent))
            if (source / "shallow").exists():
                await held.enter_async_context(self._writers(parent))
            await self._thread(lambda: self._fork(parent, target))

    def _fork(self, parent: str, target: Path) -> None:
        opened = self._open(parent)
        folders.fork(self._served(parent), target, objects.own_refs(opened), objects.head(opened))

    @asynccontextmanager
    async def making(self, repo: str) -> AsyncIterator[Path]:
        """Yield an empty repository, which has its name after the block, in the place of any other.

        Where the block fails nothing changes. Use it inside of `writing`.
        """
        path, trash = self._served(repo), self._root / "trash"
        scratch = await self._thread(lambda: folders.prepare(path, "main"))
        try:
            yield scratch
            with anyio.CancelScope(shield=True):
                await self._thread(lambda: folders.replace(scratch, path, trash))
        finally:
            with anyio.CancelScope(shield=True):
                await self._thread(lambda: layers.remove_tree(scratch))

    async def delete(self, repo: str) -> None:
        """Remove a repository or mirror; nothing where there is none. Who reads it now may get an error."""
        paths = [self._served(repo), self._mirrored(repo)]
        async with self._writers(repo):
            for path in paths:
                await self._thread(partial(folders.discard, path, self._root / "trash"))

    async def exists(self, repo: str) -> bool:
        """Whether the repository is one of our own."""
        return self._served(repo).is_dir()

    async def repositories(self) -> list[str]:
        """Return the names of our own repositories, sorted."""
        return await self._thread(lambda: folders.served(self._root / "git"))

    async def default_branch(self, repo: str) -> str:
        """Return the branch that HEAD names, which need not exist yet."""
        return await self._thread(lambda: objects.head(self._open(repo)))

    async def branches(self, repo: str) -> dict[str, str]:
        """Return branch -> commit id."""
        refs = await self.ref_snapshot(repo)
        prefix = "refs/heads/"
        return {ref.removeprefix(prefix): sha for ref, sha in refs.items() if ref.startswith(prefix)}

    async def ref_snapshot(self, repo: str) -> dict[str, str]:
        """Return branch and tag refs by full name, with the commits they lead to."""
        return await self._thread(lambda: objects.refs(self._open(repo)))

    async def refs_at(self, path: Path) -> dict[str, str]:
        """Return the refs of a repository that has no name yet, as `ref_snapshot` does."""
        return await self._thread(lambda: objects.refs(pygit2.Repository(str(path))))

    async def settle_default_branch(self, repo: str) -> None:
        """Let HEAD name the only branch, where the one it names does not exist."""
        branches, head = await self.branches(repo), await self.default_branch(repo)
        if len(branches) == 1 and head not in branches:
            (only,) = branches
            await self._thread(lambda: self._open(repo).set_head(f"refs/heads/{only}"))

    # Reading

    async def resolve(self, repo: str, ref: str) -> str:
        """Return the commit id of a branch, a tag, a full ref or a full id; NotFoundError if there is none."""
        return await self._thread(lambda: objects.resolve(self._open(repo), repo, ref))

    async def commit(self, repo: str, sha: str) -> CommitInfo:
        """Return what people see of a commit."""
        return await self._thread(lambda: objects.info(objects.commit(self._open(repo), repo, sha)))

    async def commit_title(self, repo: str, sha: str) -> str:
        """Return the first line of a commit's message."""
        return (await self.commit(repo, sha)).title

    async def commit_message(self, repo: str, sha: str) -> str:
        """Return a commit's whole message."""
        return (await self.read_commit(repo, sha)).message

    async def read_commit(self, repo: str, sha: str) -> Commit:
        """Return a whole commit."""
        return await self._thread(lambda: objects.whole(objects.commit(self._open(repo), repo, sha)))

    async def log(self, repo: str, ref: str, *, limit: int = 50, skip: int = 0) -> list[CommitInfo]:
        """Return the commits that a ref or commit leads to, the newest first; up to 1,000, after `skip` others."""

        def read() -> list[CommitInfo]:
            opened = self._open(repo)
            start = objects.resolve(opened, repo, ref)
            return objects.log(opened, repo, start, limit=limit, skip=skip)

        return await self._thread(read)

    async def read_tree(self, repo: str, sha: str, path: str = "") -> list[TreeEntry]:
        """Return what a folder of a commit holds; NotFoundError where there is none."""
        return await self._thread(lambda: objects.read_tree(self._open(repo), repo, sha, path))

    async def read_file(self, repo: str, sha: str, path: str, *, limit: int = 1 << 20) -> bytes | None:
        """Return a regular file of a commit, None where there is none; LimitExceededError above `limit` bytes."""
        return await self._thread(lambda: objects.read_file(self._open(repo), repo, sha, path, limit))

    async def read_folder(
        self, repo: str, sha: str, path: str, *, suffix: str = "", limit: int = 4 << 20
    ) -> dict[str, bytes]:
        """Return the regular files below a folder by their path in it; empty where there is no such folder.

        LimitExceededError where they have more than `limit` bytes together, or are more than 1,000.
        """
        return await self._thread(
            lambda: objects.read_folder(self._open(repo), repo, sha, path, suffix=suffix, limit=limit)
        )

    # Trees

    async def materialise(self, repo: str, sha: str) -> tuple[Path, ...]:
        """Return the commit's files on disk: layers, topmost first, the last one a whole tree.

        They belong to the sandboxes' uid and are never written to again. A commit close to one that is on disk
        costs its difference. NotFoundError where the commit is not here (`fetch` first).
        """
        check_sha(sha)
        async with self._builds(repo):
            return await self._thread(lambda: self._materialise(repo, sha))

    def _materialise(self, repo: str, sha: str) -> tuple[Path, ...]:
        opened = self._open(repo)
        oid = objects.commit(opened, repo, sha).tree_id
        base = self._trees.find(repo, f"base-{oid}")
        if base is not None:
            return (base.path,)
        found = Objects(opened)
        return self._delta(repo, oid, found) or (self._base(repo, oid, found),)

    def _base(self, repo: str, oid: pygit2.Oid, found: Objects) -> Path:
        def fill(writer: TreeWriter) -> None:
            commit_trees.write_tree(found, oid.raw, writer)

        return self._trees.build(repo, f"base-{oid}", fill).path

    def _delta(self, repo: str, oid: pygit2.Oid, found: Objects) -> tuple[Path, ...]:
        bases = self._trees.bases(repo)[:_BASES_TRIED]
        for base in bases:
            if delta := self._trees.find(repo, f"delta-{base.key.removeprefix('base-')}-{oid}"):
                return delta.path, base.path
        for base in bases:
            old = base.key.removeprefix("base-")

            def fill(writer: TreeWriter, old: str = old) -> None:
                commit_trees.write_delta(found, bytes.fromhex(old), oid.raw, writer, limit=_DELTA_LIMIT)

            try:
                delta = self._trees.build(repo, f"delta-{old}-{oid}", fill, base=base.key)
            except (commit_trees.TooDifferentError, FailedError):
                # Not every base's objects need still be here; whether the commit is at fault, a base will tell.
                continue
            self._trees.find(repo, base.key)
            return delta.path, base.path
        return ()

    async def evict(self, budget: int, keep: Collection[Path]) -> int:
        """Remove trees, longest unused first, down to `budget` bytes, sparing `keep`; returns bytes freed."""
        return await self._thread(lambda: self._trees.evict(budget, keep))

    async def sweep(self) -> set[str]:
        """Repair what a killed process left half done, and end what it left running. Call once at start.

        Returns our own repositories that may have changed without anybody being told; call `reconciled` when
        everybody is.
        """
        await self._thread(git_commands.end_orphans)
        await self._thread(self._trees.sweep)
        return await self._thread(self._sweep)

    def _sweep(self) -> set[str]:
        for folder in ("git", "mirrors"):
            folders.sweep(self._root / folder, self._root / "trash")
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

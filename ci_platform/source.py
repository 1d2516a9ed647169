"""Repositories: mirrors of remote ones, the ones we serve ourselves, and the trees of their commits.

The only importer of pygit2 next to `forges.local`. Everything blocking runs in threads of its own limiter. Where
libgit2 is the wrong tool (fetching, serving) the `git` program is used through `ci_platform.git_commands`.
"""

from __future__ import annotations

import re
import secrets
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import pygit2

from ci_platform import commit_trees, git_commands, layers
from ci_platform.errors import (
    ConflictError,
    FailedError,
    InvalidInputError,
    LimitExceededError,
    NotFoundError,
    UnavailableError,
)
from ci_platform.fetching import Fetch, Remote
from ci_platform.sandboxes import SANDBOX_UID
from ci_platform.trees import Owner, TreeLimits, TreeStore, TreeWriter

__all__ = ["CommitInfo", "Remote", "Source", "check_repo", "check_sha"]

T = TypeVar("T")

_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}/[A-Za-z0-9_.-]{1,100}")
_SHA = re.compile(r"[0-9a-f]{40}")
_DELTA_LIMIT = 1000
"""Paths above which a new base costs less than a delta (measured: 1,000 paths take about 250 ms)."""

_BASES_TRIED = 3
_LONGEST_REF = 1024
_COMMIT_LIMIT = 1 << 20
_FOLDER_FILES = 1000
_BLOB_LIMIT = 1 << 30
"""Bytes of one file: libgit2 has it in memory as a whole."""


@dataclass(frozen=True, slots=True)
class CommitInfo:
    """What people see of a commit. `title` is its first line, at most 200 characters."""

    sha: str
    title: str
    author: str
    committed_at: datetime


def check_repo(repo: str) -> str:
    """Return the name if it is `owner/name` and safe as a path; InvalidInputError otherwise."""
    if not _REPO.fullmatch(repo) or repo.endswith((".git", ".lock", "/.", "/..")):
        raise InvalidInputError(f"a repository is named like 'owner/name', got {repo[:100]!r}")
    return repo


def check_sha(sha: str) -> str:
    """Return the commit id if it is one in full; InvalidInputError otherwise."""
    if not _SHA.fullmatch(sha):
        raise InvalidInputError(f"a commit is named by 40 hexadecimal digits, got {sha[:60]!r}")
    return sha


class Source:
    """All repositories below one folder: `git/` is served, `mirrors/` is fetched, `trees/` are commits on disk.

    *Concurrency*: one event loop; one fetch and one tree at a time per repository. *Idempotency*: everything but
    `create`. *Cancellation*: a fetch is killed; work in threads ends first. *Errors*: InvalidInputError for names
    no repository can have, NotFoundError, FailedError where the repository is at fault, UnavailableError where
    a remote is.
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
        self._trees = TreeStore(root / "trees", Owner.of_sandboxes(SANDBOX_UID), limits or TreeLimits())
        self._limiter = anyio.CapacityLimiter(threads)
        self._fetches: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)
        self._builds: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)
        _isolate_libgit2()

    async def _thread(self, function: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(function, limiter=self._limiter)

    # Where things are

    def _served(self, repo: str) -> Path:
        return self._root / "git" / f"{check_repo(repo)}.git"

    def path(self, repo: str) -> Path:
        """Return the repository's folder: the one that is served if there is one, else the mirror's."""
        served = self._served(repo)
        return served if served.is_dir() else self._root / "mirrors" / f"{repo}.git"

    def _open(self, repo: str) -> pygit2.Repository:
        path = self.path(repo)
        try:
            return pygit2.Repository(str(path), pygit2.enums.RepositoryOpenFlag.NO_SEARCH)
        except pygit2.GitError:
            raise NotFoundError(f"there is no repository {repo!r}") from None

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
        if ref is not None and (not ref.startswith("refs/") or not pygit2.reference_is_valid_name(ref)):
            raise InvalidInputError(f"not the full name of a ref: {ref[:100]!r}")
        async with self._fetches[repo]:
            if not await self.has(repo, sha):
                await self._thread(lambda: self._prepare_mirror(repo))
                protocols = "file:http:https" if self._allow_file else "http:https"
                path, within = self.path(repo), self._fetch_within
                await Fetch(path, repo, sha, ref, remote, protocols, within)(lambda: self.has(repo, sha))

    def _prepare_mirror(self, repo: str) -> None:
        path = self.path(repo)
        if not path.is_dir():
            _initialise(path, "main")

    async def maintain(self, repo: str) -> None:
        """Pack into one what fetches and pushes left in pieces; nothing is dropped. Worth it once a day."""
        command = ["--git-dir", str(self.path(repo)), "repack", "-a", "-d", "--keep-unreachable", "--quiet"]
        async with self._fetches[repo], self._builds[repo]:
            try:
                await git_commands.run(command, git_commands.environment(), within=self._fetch_within)
            except git_commands.GitError as error:
                raise UnavailableError(f"{repo!r} cannot be packed: {error}") from None

    # Repositories of our own

    async def create(self, repo: str, *, default_branch: str = "main") -> None:
        """Create an empty repository that is served; ConflictError if it exists."""
        if not pygit2.reference_is_valid_name(f"refs/heads/{default_branch}"):
            raise InvalidInputError(f"no branch can be named {default_branch[:100]!r}")
        path = self._served(repo)
        if path.exists():
            raise ConflictError(f"the repository {repo!r} exists already")
        await self._thread(lambda: _initialise(path, default_branch))

    async def exists(self, repo: str) -> bool:
        """Whether the repository is one of our own."""
        return self._served(repo).is_dir()

    async def repositories(self) -> list[str]:
        """Return the names of our own repositories, sorted."""
        folders = await self._thread(lambda: sorted((self._root / "git").glob("*/*.git")))
        return [f"{path.parent.name}/{path.name.removesuffix('.git')}" for path in folders]

    async def default_branch(self, repo: str) -> str:
        """Return the branch that HEAD names, which need not exist yet."""
        return await self._thread(lambda: _head(self._open(repo)))

    async def branches(self, repo: str) -> dict[str, str]:
        """Return branch -> commit id."""
        refs = await self.ref_snapshot(repo)
        prefix = "refs/heads/"
        return {ref.removeprefix(prefix): sha for ref, sha in refs.items() if ref.startswith(prefix)}

    async def ref_snapshot(self, repo: str) -> dict[str, str]:
        """Return branch and tag refs by full name, with the commits they lead to."""
        return await self._thread(lambda: _refs(self._open(repo)))

    async def settle_default_branch(self, repo: str) -> None:
        """Let HEAD name the only branch, where the one it names does not exist."""
        branches, head = await self.branches(repo), await self.default_branch(repo)
        if len(branches) == 1 and head not in branches:
            (only,) = branches
            await self._thread(lambda: self._open(repo).set_head(f"refs/heads/{only}"))

    # Reading

    async def resolve(self, repo: str, ref: str) -> str:
        """Return the commit id of a branch, a tag, a full ref or a full id; NotFoundError if there is none."""
        return await self._thread(lambda: _resolve(self._open(repo), repo, ref))

    async def commit(self, repo: str, sha: str) -> CommitInfo:
        """Return what people see of a commit."""
        return await self._thread(lambda: _info(_commit(self._open(repo), repo, sha)))

    async def commit_title(self, repo: str, sha: str) -> str:
        """Return the first line of a commit's message."""
        return (await self.commit(repo, sha)).title

    async def commit_message(self, repo: str, sha: str) -> str:
        """Return a commit's whole message."""
        return str(await self._thread(lambda: _commit(self._open(repo), repo, sha).message))

    async def read_file(self, repo: str, sha: str, path: str, *, limit: int = 1 << 20) -> bytes | None:
        """Return a regular file of a commit, None where there is none; LimitExceededError above `limit` bytes."""
        return await self._thread(lambda: self._read_file(repo, sha, path, limit))

    def _read_file(self, repo: str, sha: str, path: str, limit: int) -> bytes | None:
        opened = self._open(repo)
        objects = _Objects(opened)
        found = commit_trees.find(objects, _commit(opened, repo, sha).tree.id.raw, path)
        return objects.read(found.oid, limit=limit, name=path) if found and found.is_file else None

    async def read_folder(
        self, repo: str, sha: str, path: str, *, suffix: str = "", limit: int = 4 << 20
    ) -> dict[str, bytes]:
        """Return the regular files below a folder by their path in it; empty where there is no such folder.

        LimitExceededError where they have more than `limit` bytes together, or are more than 1,000.
        """
        return await self._thread(lambda: self._read_folder(repo, sha, path, suffix, limit))

    def _read_folder(self, repo: str, sha: str, path: str, suffix: str, limit: int) -> dict[str, bytes]:
        opened = self._open(repo)
        objects, found = _Objects(opened), dict[str, bytes]()
        folder = commit_trees.find(objects, _commit(opened, repo, sha).tree.id.raw, path)
        if folder is None or not folder.is_tree:
            return found
        for name, item in commit_trees.files(objects, folder.oid, suffix=suffix):
            found[name] = objects.read(item.oid, limit=limit, name=f"{path}/{name}")
            limit -= len(found[name])
            if len(found) > _FOLDER_FILES:
                raise LimitExceededError(f"{path} of the commit has more than {_FOLDER_FILES} files")
        return found

    # Trees

    async def materialise(self, repo: str, sha: str) -> tuple[Path, ...]:
        """Return the commit's files on disk: layers, topmost first, the last one a whole tree.

        They belong to the sandboxes' uid and are never written to again. A commit close to one that is on disk
        costs its difference. NotFoundError where the commit is not here (`fetch` first).
        """
        check_sha(sha)
        async with self._builds[repo]:
            return await self._thread(lambda: self._materialise(repo, sha))

    def _materialise(self, repo: str, sha: str) -> tuple[Path, ...]:
        opened = self._open(repo)
        oid = _commit(opened, repo, sha).tree.id
        base = self._trees.find(repo, f"base-{oid}")
        if base is not None:
            return (base.path,)
        objects = _Objects(opened)
        return self._delta(repo, oid, objects) or (self._base(repo, oid, objects),)

    def _base(self, repo: str, oid: pygit2.Oid, objects: _Objects) -> Path:
        def fill(writer: TreeWriter) -> None:
            commit_trees.write_tree(objects, oid.raw, writer)

        return self._trees.build(repo, f"base-{oid}", fill).path

    def _delta(self, repo: str, oid: pygit2.Oid, objects: _Objects) -> tuple[Path, ...]:
        bases = self._trees.bases(repo)[:_BASES_TRIED]
        for base in bases:
            if delta := self._trees.find(repo, f"delta-{base.key.removeprefix('base-')}-{oid}"):
                return delta.path, base.path
        for base in bases:
            old = base.key.removeprefix("base-")

            def fill(writer: TreeWriter, old: str = old) -> None:
                commit_trees.write_delta(objects, bytes.fromhex(old), oid.raw, writer, limit=_DELTA_LIMIT)

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

    async def sweep(self) -> None:
        """Remove what a killed process left half done, and end what it left running. Call once at start."""
        await self._thread(git_commands.end_orphans)
        await self._thread(self._trees.sweep)
        await self._thread(self._sweep)

    def _sweep(self) -> None:
        for folder in (self._root / "git", self._root / "mirrors"):
            for path in folder.glob("*/.new-*"):
                layers.remove_tree(path)
            for path in folder.glob("*/*.git"):
                _unlock(path)


def _unlock(repository: Path) -> None:
    """Remove what git processes left that died with an earlier process of ours: nobody else works here."""
    for lock in (*repository.glob("*.lock"), *repository.glob("refs/**/*.lock")):
        lock.unlink(missing_ok=True)
    for path in repository.glob("objects/pack/tmp_*"):
        path.unlink(missing_ok=True)
    for path in (*repository.glob("objects/tmp_objdir-*"), *repository.glob("objects/incoming-*")):
        layers.remove_tree(path)


@dataclass(frozen=True, slots=True)
class _Objects:
    repository: pygit2.Repository

    def read(self, oid: bytes, *, limit: int = _BLOB_LIMIT, name: str = "a file") -> bytes:
        key = pygit2.Oid(raw=oid)
        try:
            # The header first: a few bytes of pack can unfold to gigabytes.
            size = self.repository.odb.read_header(key)[1]
            if size > limit:
                raise LimitExceededError(f"{name} of the commit has {size} bytes, more than {limit}")
            content: bytes = self.repository.odb.read(key)[1]
        except (KeyError, pygit2.GitError) as error:
            raise FailedError(f"the repository has no object {key}: {error}") from None
        return content


def _isolate_libgit2() -> None:
    """Keep libgit2 from reading users' configuration and from minding whose repositories these are."""
    levels = pygit2.enums.ConfigLevel
    for level in (levels.SYSTEM, levels.XDG, levels.GLOBAL, levels.PROGRAMDATA):
        pygit2.settings.search_path[level] = ""
    pygit2.settings.owner_validation = False


def _initialise(path: Path, default_branch: str) -> None:
    scratch = path.parent / f".new-{secrets.token_hex(8)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        pygit2.init_repository(str(scratch), bare=True, initial_head=default_branch)
        scratch.rename(path)
    except OSError as error:
        if not path.is_dir():
            raise UnavailableError(f"cannot create {path}: {error}") from error
    finally:
        layers.remove_tree(scratch)


def _refs(opened: pygit2.Repository) -> dict[str, str]:
    found = {}
    for reference in opened.references.iterator():
        name = reference.name
        # Git takes any bytes for a name. One that is no printable text starts nothing: no database would hold it.
        if (
            name.startswith(("refs/heads/", "refs/tags/"))
            and name.isprintable()
            and len(name) <= _LONGEST_REF
        ):
            found[name] = _peeled(reference)
    return found


def _peeled(reference: pygit2.Reference) -> str:
    """Return the commit behind a ref; of a tag of something else, what it names itself."""
    try:
        return str(reference.peel(pygit2.Commit).id)
    except (pygit2.GitError, ValueError):
        return str(reference.target)


def _head(opened: pygit2.Repository) -> str:
    target = opened.lookup_reference("HEAD").target
    return str(target).removeprefix("refs/heads/")


def _resolve(opened: pygit2.Repository, repo: str, ref: str) -> str:
    if _SHA.fullmatch(ref):
        return str(_commit(opened, repo, ref).id)
    for name in (ref, f"refs/heads/{ref}", f"refs/tags/{ref}"):
        if name.startswith("refs/") and pygit2.reference_is_valid_name(name) and name in opened.references:
            return str(opened.references[name].peel(pygit2.Commit).id)
    raise NotFoundError(f"{repo!r} has no branch or tag {ref[:100]!r}")


def _commit(opened: pygit2.Repository, repo: str, sha: str) -> Any:
    key = pygit2.Oid(hex=check_sha(sha))
    # The header first: a few bytes of pack can unfold to gigabytes of message.
    if key in opened and (size := opened.odb.read_header(key)[1]) > _COMMIT_LIMIT:
        raise LimitExceededError(f"the commit {sha} itself has {size} bytes, more than {_COMMIT_LIMIT}")
    found: Any = opened.get(key)
    if not isinstance(found, pygit2.Commit):
        raise NotFoundError(f"{repo!r} has no commit {sha} here")
    return found


def _info(commit: Any) -> CommitInfo:
    title = commit.message.strip().partition("\n")[0][:200]
    return CommitInfo(
        str(commit.id), title, commit.author.name, datetime.fromtimestamp(commit.commit_time, UTC)
    )

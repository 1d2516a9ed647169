"""Repositories: mirrors of remote ones, the ones we serve ourselves, and the trees of their commits.

The only importer of pygit2 next to `forges.local`. Everything blocking runs in threads of its own limiter. Where
libgit2 is the wrong tool (fetching, serving) the `git` program is used through `ci_platform.git_commands`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pygit2

from ci_platform import git_commands
from ci_platform.fetching import Remote
from ci_platform.hydration.mounts import LazyLower
from ci_platform.hydration.plan import Threshold
from ci_platform.lfs_pointers import Pointed
from ci_platform.mirroring import Mirror
from ci_platform.sandboxes import SANDBOX_UID
from ci_platform.source import objects
from ci_platform.source.checkouts import Checkout, Checkouts
from ci_platform.source.grafted import ModuleTrees
from ci_platform.source.hydrating import Hydration
from ci_platform.source.lfs_layers import LfsTrees
from ci_platform.source.lfs_store import LfsStore
from ci_platform.source.names import check_repo
from ci_platform.source.objects import check_sha
from ci_platform.source.reading import OnDamage, Reading, RemoteOf
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


class Source(Reading):
    """All repositories below one folder: `git/` is served, `mirrors/` is fetched, `trees/` are commits on disk.

    *Concurrency*: one event loop; one writer and one tree at a time per repository, any number of readers.
    *Idempotency*: everything but `create` and `fork`. *Cancellation*: git is killed, and what it left is tidied;
    work in threads ends first. *Errors*: InvalidInputError for names no repository can have, NotFoundError,
    FailedError where the repository is at fault, UnavailableError where a remote is. `look_only`: nothing will be
    asked for that writes, so that not even folders are made.
    """

    def __init__(  # noqa: PLR0913 - what the settings say of repositories
        self,
        root: Path,
        *,
        allow_file: bool = False,
        limits: TreeLimits | None = None,
        fetch_within: timedelta = timedelta(minutes=10),
        threads: int = 4,
        remote_of: RemoteOf | None = None,
        on_damage: OnDamage | None = None,
        lazy: Threshold | None = None,
        look_only: bool = False,
    ) -> None:
        super().__init__(
            root,
            within=fetch_within,
            threads=threads,
            allow_file=allow_file,
            remote_of=remote_of,
            on_damage=on_damage,
            look_only=look_only,
        )
        owner, limits = Owner.of_sandboxes(SANDBOX_UID), limits or TreeLimits()
        self._trees = TreeStore(root / "trees", owner, look_only=look_only)
        self._checkouts = Checkouts(self._trees, owner, limits, lazy)
        self.hydration = Hydration(root / "trees", owner, limits, lazy)
        self.lfs, self._lfs_trees = LfsStore(root / "lfs", owner), LfsTrees(self._trees, owner)
        self._modules = ModuleTrees(self._trees, owner, limits, self._with)

    async def environment(self, repo: str, settings: Mapping[str, str]) -> dict[str, str]:
        """Return the environment in which git serves a repository of our own.

        It may fetch in there for a partial import alone, and from where that comes from.
        """
        mirror = Mirror(self.path(repo), Remote(""), self.protocols, self._within)
        if mirror.is_partial and (remote := await self._remote_of(repo)) is not None:
            return replace(mirror, remote=remote).environment(settings)
        return git_commands.environment(settings)

    # Trees

    async def materialise(self, repo: str, sha: str) -> tuple[Path, ...]:
        """Return the commit's files on disk: layers, topmost first, the last one a whole tree.

        They belong to the sandboxes' uid and are never written to again. A commit close to one that is on disk
        costs its difference. NotFoundError where the commit is not here (`fetch` first).
        """
        check_sha(sha)
        await self.hydration.written(repo)
        return await self._read(
            repo, sha, lambda opened: self._checkouts.materialise(repo, opened, sha), building=True
        )

    async def checkout(
        self, repo: str, folder: GitFolder, git: str | None = None, *, lazy: bool = False
    ) -> Checkout:
        """Return the commit's files as `materialise` does, and on top of them a `.git`.

        `git` is that of an earlier checkout of the same commit, which is taken as long as it is here. With `lazy`,
        the files of a large tree need not be on disk yet: they are written from now on, and `hold` has them meanwhile.
        """
        check_sha(folder.sha)
        self._used(repo)
        if lazy and self.hydration.refused is None:
            found = await self._checkout(repo, folder, git, lazy=True)
            if self.hydration.takes(found):
                self.hydration.write(repo, self.path(repo), found, folder.cone)
                return found
        await self.hydration.written(repo)
        return await self._checkout(repo, folder, git, lazy=False)

    async def _checkout(self, repo: str, folder: GitFolder, git: str | None, *, lazy: bool) -> Checkout:
        def build(opened: pygit2.Repository) -> Checkout:
            return self._checkouts.with_git(repo, opened, folder, git, lazy=lazy)

        def need(opened: pygit2.Repository) -> Iterator[bytes]:
            return objects.blobs_of(opened, repo, folder.sha, folder.cone)

        # Of a commit alone everything is packed.
        return await self._read(repo, folder.sha, build, building=True, need=None if folder.alone else need)

    async def hold(self, repo: str, found: Checkout) -> LazyLower | None:
        """Return the lazy tree of a checkout for one command; None where it has to wait for files on disk."""
        return await self.hydration.hold(repo, self.path(repo), found)

    async def module_layer(
        self,
        repo: str,
        modules: Sequence[Module],
        folder: GitFolder,
        config: str,
        key: str | None = None,
    ) -> Path:
        """Return a layer with the files of submodules, and their `.git`: that of an earlier call by its key.

        Where it is not here (any more) it is made, by the same key, of commits that have to be here.
        """
        for each in modules:
            self._used(each.store)
        async with AsyncExitStack() as held:
            # In one order, whoever holds some of them meanwhile: nothing may pack what is read.
            for name in sorted({repo, *(module.store for module in modules)}):
                await held.enter_async_context(self._builds(name))
            return await self._thread(lambda: self._modules.layer(repo, modules, folder, config, key))

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

        return await self._read(repo, folder.sha, make, building=True)

    # Garbage

    async def trees(self) -> list[tuple[str, StoredTree]]:
        """Return the trees on disk with their repositories."""
        return await self._thread(self._trees.all)

    async def remove_tree(self, repo: str, key: str) -> bool:
        """Remove a tree that nobody uses; False where it is safe by now, see `TreeStore.remove`."""
        async with self._builds(repo):
            return await self._thread(lambda: self._trees.remove(repo, key))

    async def close(self) -> None:
        """End what works in the background. What commands use they keep."""
        await self.hydration.close()

    async def sweep(self) -> set[str]:
        """Repair what a killed process left half done, and end what it left running. Call once at start.

        Returns our own repositories that may have changed without anybody being told; call `reconciled` when
        everybody is.
        """
        await self._thread(git_commands.end_orphans)
        await self._thread(self._trees.sweep)
        await self._thread(self.lfs.sweep)
        await self.hydration.sweep()
        return await self._thread(self._repair)

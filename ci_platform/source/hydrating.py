"""Lazy trees of repositories: who serves them, who writes them to disk meanwhile, and when one is not to be trusted."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread

from ci_platform import git_commands
from ci_platform.cones import Cone
from ci_platform.errors import UnavailableError
from ci_platform.hydration import mounts
from ci_platform.hydration.builders import Builders
from ci_platform.hydration.mounts import LazyLower, Mounts
from ci_platform.hydration.plan import Threshold
from ci_platform.source.checkouts import Checkout
from ci_platform.trees import Owner, TreeLimits

T = TypeVar("T")

_log = logging.getLogger(__name__)

_WAITING = 64
"""Threads that wait for trees to be written: they do nothing else."""


class Hydration:
    """What is lazy below a folder of trees. For one event loop.

    `threshold` says which trees; None: none are. *Errors*: UnavailableError where a tree cannot be mounted.
    """

    def __init__(self, trees: Path, owner: Owner, limits: TreeLimits, threshold: Threshold | None) -> None:
        self._trees, self._owner, self._limits = trees, owner, limits
        self.refused = "it is switched off" if threshold is None else mounts.refusal()
        self._mounts, self._builders = Mounts(trees / ".lazy"), Builders()
        self._limiter = anyio.CapacityLimiter(_WAITING)
        self._distrusted: set[Path] = set()

    def takes(self, found: Checkout) -> bool:
        """Whether a lazy tree may be used as one."""
        return found.lazy is None or (self.refused is None and found.lazy not in self._distrusted)

    def write(self, repo: str, repository: Path, found: Checkout, cone: Cone | None) -> None:
        """Begin to write a lazy tree to disk, unless that is being done."""
        if found.lazy is None:
            return
        order = {
            "root": str(self._trees),
            "owner": [self._owner.uid, self._owner.gid],
            "limits": [self._limits.files, self._limits.size],
            "repo": repo,
            "repository": str(repository),
            "tree": found.tree,
            "cone": None if cone is None else list(cone.folders),
        }
        finished = partial(self._mounts.release, found.lazy)
        self._builders.start(repo, found.lazy.name, order, finished)

    async def written(self, repo: str) -> None:
        """Wait until nothing of a repository is being written; who needs all files on disk sees then what is."""
        if self._builders.is_busy(repo):
            await self._thread(lambda: self._builders.wait(repo))

    async def hold(self, repo: str, repository: Path, found: Checkout) -> LazyLower | None:
        """Return a lazy tree for one command; None where there cannot be one (any more)."""
        tree = found.lazy
        if tree is None or not self.takes(found):
            return None
        try:
            # Not abandoned: nobody would let go of what it returns.
            hold = await anyio.to_thread.run_sync(
                lambda: self._mounts.hold(tree, repository, _environment()), limiter=self._limiter
            )
        except UnavailableError as error:
            self.distrust(tree, str(error))
            return None
        if not self._builders.is_busy(repo):
            self._mounts.release(tree)  # it has been written meanwhile, so nobody else will
        return hold

    def distrust(self, tree: Path, why: str) -> None:
        """From now on use a tree when it is on disk, and not before."""
        _log.warning("commands wait for a tree to be on disk: %s", why)
        self._distrusted.add(tree)

    async def _thread(self, function: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(function, limiter=self._limiter, abandon_on_cancel=True)

    async def sweep(self) -> None:
        """Remove what programs have left that were killed. Call once at start."""
        await self._thread(self._mounts.sweep)

    async def close(self) -> None:
        """End what is being written, and let go of lazy trees; commands that use one keep it."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._builders.close)
            await anyio.to_thread.run_sync(self._mounts.close)


def _environment() -> dict[str, str]:
    """Return what git needs to read a repository: nothing by which it would be ended with us, and no proxies."""
    kept = {"PATH", "HOME", "LC_ALL"}
    found = git_commands.environment()
    return {name: value for name, value in found.items() if name in kept or name.startswith("GIT_")}


def unavailable() -> str | None:
    """Return why trees cannot be lazy here; None where they can. Tries it; takes a tenth of a second."""
    return mounts.refusal() if os.geteuid() != 0 else (mounts.refusal() or mounts.trial())

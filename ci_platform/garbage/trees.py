"""Trees of commits: made again from the repository's objects when they are needed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio.to_thread

from ci_platform.garbage import Allowance, Item
from ci_platform.garbage.wanted import Wanted
from ci_platform.source import Source
from ci_platform.tree_store import CHEAP_FOR, SAFE_FOR, StoredTree

Ask = Callable[[], Awaitable[Wanted]]
"""Asks what runs that have not ended stand on."""


class Trees:
    """Base trees, deltas and the `.git` of checkouts. `in_use` says on which folders somebody stands now."""

    kind = "trees"

    def __init__(
        self, source: Source, allowance: Allowance, *, in_use: Callable[[], Collection[Path]], wanted: Ask
    ) -> None:
        self.allowance = allowance
        self._source, self._in_use, self._wanted = source, in_use, wanted

    async def items(self) -> Sequence[Item]:
        """Return all trees. One on which others stand was used when they were."""
        found = await self._wanted()
        wanted = found.layers | await self._source.tree_ids(found.commits)
        in_use, now = set(self._in_use()), time.time()
        trees = await self._source.trees()
        return await anyio.to_thread.run_sync(
            lambda: [self._item(repo, tree, wanted, in_use, now) for repo, tree in trees]
        )

    def _item(
        self, repo: str, tree: StoredTree, wanted: set[tuple[str, str]], in_use: set[Path], now: float
    ) -> Item:
        used_at = datetime.fromtimestamp(tree.used_at, UTC)
        pinned = None
        if tree.path in in_use:
            pinned = "a command or a reader stands on it"
        elif tree.used_at > now - SAFE_FOR:
            pinned = "used a short while ago"
        elif not tree.cheap and not wanted.isdisjoint(
            [(repo, tree.key), (repo, tree.key.rpartition("-")[2])]
        ):
            pinned = "a run that has not ended stands on it"
        expires_at = used_at + timedelta(seconds=CHEAP_FOR) if tree.cheap else None
        below = None if tree.base is None else f"{repo}/{tree.base}"
        return Item(f"{repo}/{tree.key}", repo, tree.size, used_at, _files(tree), pinned, expires_at, below)

    async def collect(self, name: str) -> bool:
        """Delete one, unless somebody stands on it by now."""
        repo, _, key = name.rpartition("/")
        if any(path.parent.name == key for path in self._in_use()):
            return False
        return await self._source.remove_tree(repo, key)


def _files(tree: StoredTree) -> int:
    """Return how many files a whole tree has, by the head of its index; 1 of others, which have few."""
    if tree.base is None:
        with contextlib.suppress(OSError), (tree.folder / "index").open("rb") as index:
            return int.from_bytes(index.read(12)[8:], "big")
    return 1

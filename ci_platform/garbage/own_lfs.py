"""Files of LFS that were pushed to repositories of our own, and that no commit there names (any more)."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import UTC, datetime

import anyio.to_thread

from ci_platform import workspace_git
from ci_platform.errors import UnavailableError
from ci_platform.garbage import Allowance, Item
from ci_platform.garbage.wanted import Wanted
from ci_platform.source import Source
from ci_platform.source.lfs_references import named
from ci_platform.source.own_lfs import OwnLfs, Pushed

SAFE_FOR = 86_400.0
"""Seconds after a file was announced in which the commit that names it may still come: a push of hours."""

_UNREADABLE = "not all of the repository's commits can be read"


class PushedLfsFiles:
    """Files by repository and id. What a branch, a tag or a run that has not ended leads to stays, whatever happens.

    What commits name is remembered as long as refs and packs are as they were: looking takes seconds where a repository
    is large.
    """

    kind = "pushed lfs files"

    def __init__(
        self,
        source: Source,
        allowance: Allowance,
        *,
        wanted: Callable[[], Awaitable[Wanted]],
        safe_for: float = SAFE_FOR,
    ) -> None:
        self.allowance = allowance
        self._source, self._wanted, self._safe_for = source, wanted, safe_for
        self._known: dict[str, tuple[object, set[str]]] = {}

    async def items(self) -> Sequence[Item]:
        """Return all files. One that forks share takes nothing: deleting it in one of them would free nothing."""
        commits, found = await self._commits(), list[Item]()
        repos = await self._source.repositories()
        self._known = {repo: known for repo, known in self._known.items() if repo in repos}
        for repo in repos:
            found += await anyio.to_thread.run_sync(self._items, repo, commits[repo])
        return found

    async def _commits(self) -> dict[str, set[str]]:
        commits = defaultdict[str, set[str]](set)
        for repo, sha in (await self._wanted()).lfs:
            commits[repo].add(sha)
        return commits

    def _items(self, repo: str, commits: Collection[str]) -> list[Item]:
        pushed = list(OwnLfs(self._source.path(repo)).pushed())
        if not pushed:
            return []
        names = self._named(repo, commits)
        return [self._item(repo, each, names) for each in pushed]

    def _item(self, repo: str, pushed: Pushed, names: Collection[str] | None) -> Item:
        pinned = None
        if names is None:
            pinned = _UNREADABLE
        elif pushed.oid in names:
            pinned = "a commit names it"
        elif pushed.used_at > time.time() - self._safe_for:
            pinned = "used a short while ago"
        used_at = datetime.fromtimestamp(pushed.used_at, UTC)
        return Item(f"{repo}/{pushed.oid}", repo, pushed.size, used_at, pinned=pinned)

    def _named(self, repo: str, commits: Collection[str]) -> set[str] | None:
        """Return what commits name, None where they cannot be read."""
        path = self._source.path(repo)
        state = (workspace_git.state_of(path), frozenset(commits))
        known = self._known.get(repo)
        if known is not None and known[0] == state:
            return known[1]
        try:
            names = named(path, commits)
        except UnavailableError:
            return None
        self._known[repo] = (state, names)
        return names

    async def collect(self, name: str) -> bool:
        """Delete one, unless a commit names it by now, or it was announced once more."""
        repo, _, oid = name.rpartition("/")
        commits, before = (await self._commits())[repo], time.time() - self._safe_for

        def remove() -> bool:
            names = self._named(repo, commits)
            if names is None or oid in names:
                return False
            return OwnLfs(self._source.path(repo)).remove(oid, before)

        return await anyio.to_thread.run_sync(remove)

"""`env.ARTIFACTS`: workspaces of a run's repository, and what a run may read of its history."""

from __future__ import annotations

from typing import Any, cast

from ci_platform.capabilities import ArtifactsCapability, RunIdentity, calling
from ci_platform.errors import ForbiddenError, InvalidInputError
from ci_platform.source import Source
from ci_platform.workspaces import Workspaces
from pipelines.contract import Commit, CommitInfo, TreeEntry

_LONGEST_LOG = 1000
_LONGEST_LIST = 5000
_MOST_SKIPPED = 10_000
_LONGEST_TEXT = 4096


class RepositoryCapability(ArtifactsCapability):
    """Workspaces and history of this run's repository. A run of a fork's pull request reads its own commit alone."""

    def __init__(self, workspaces: Workspaces, source: Source) -> None:
        super().__init__(workspaces)
        self._source = source

    async def log(self, repo: Any, ref: Any = None, *, limit: Any = 50, skip: Any = 0) -> list[CommitInfo]:
        """Return commits that a branch, tag or commit leads to (default: the run's commit), the newest first.

        `limit` up to 1,000 of them, after `skip` others, as far as the platform has the history: fewer than `limit`
        are the last.
        """
        identity = _reads(repo, "ARTIFACTS.log")
        start = _commit(ref, identity, names=True)
        most = _number("limit", limit, 1, _LONGEST_LOG)
        first = _number("skip", skip, 0, _MOST_SKIPPED)
        if identity.trusted:
            return await self._source.log(identity.repo, start, limit=most, skip=first, fetch=True)
        # What came before its commit is not this run's to read.
        own = await self._source.log(identity.repo, start, limit=1, fetch=True)
        return own[first:]

    async def read_commit(self, repo: Any, sha: Any = None) -> Commit:
        """Return a whole commit, by its full id (default: the run's)."""
        identity = _reads(repo, "ARTIFACTS.read_commit")
        return await self._source.read_commit(identity.repo, _commit(sha, identity), fetch=True)

    async def read_tree(
        self, repo: Any, sha: Any = None, path: Any = "", *, limit: Any = 1000, skip: Any = 0
    ) -> list[TreeEntry]:
        """Return what a folder of a commit (default: the run's) holds, in git's order; `path` empty: its root.

        `limit` up to 5,000 entries, after `skip` others: fewer than `limit` are the last. NotFoundError where there
        is no such folder.
        """
        identity = _reads(repo, "ARTIFACTS.read_tree")
        commit = _commit(sha, identity)
        if not _is_text(path, least=0):
            raise InvalidInputError(f"path is a folder of the commit, such as 'docs/api', not {path!r:.100}")
        most = _number("limit", limit, 1, _LONGEST_LIST)
        first = _number("skip", skip, 0, 1 << 30)
        return await self._source.read_tree(
            identity.repo, commit, path.strip("/"), limit=most, skip=first, fetch=True
        )


def _reads(repo: Any, what: str) -> RunIdentity:
    """Return which run reads. In a step: branches move, and a run that is replayed has to find the same."""
    identity, _ = calling(what)
    if repo != identity.repo:
        raise ForbiddenError(f"this run belongs to {identity.repo!r} and cannot read {repo!r:.100}")
    return identity


def _commit(named: Any, identity: RunIdentity, *, names: bool = False) -> str:
    """Return what was asked for, a commit's id or with `names` a branch or tag; the run's commit for None."""
    ref = identity.sha if named is None else named
    if not _is_text(ref, least=1):
        what = "a branch, a tag or a full commit id" if names else "a full commit id"
        raise InvalidInputError(f"{what} is wanted, not {named!r:.100}")
    if ref != identity.sha and not identity.trusted:
        raise ForbiddenError(f"a pull request from a fork may read its own commit {identity.sha} only")
    return cast("str", ref)


def _is_text(value: Any, *, least: int) -> bool:
    """Whether this is text that git can have for a name, in one of the forms in which Python holds any bytes."""
    if not isinstance(value, str) or not least <= len(value) <= _LONGEST_TEXT or "\0" in value:
        return False
    try:
        value.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _number(name: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise InvalidInputError(f"{name} is a number from {least:,} to {most:,}, not {value!r:.20}")
    return value

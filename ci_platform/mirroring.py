"""All of a remote repository, by the `git` program: filled, kept like the remote, looked at object by object.

A partial mirror has every commit and folder, and files from when they are first read: git calls what it comes
from its promisor. Address and credentials are in the environment of each command and in no file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from ci_platform import git_commands
from ci_platform.errors import FailedError, InvalidInputError
from ci_platform.fetching import NO_REPOSITORY, REFUSED, Remote
from ci_platform.git_commands import Credentials, GitError

PARTIAL = "dynflow-partial"
"""A file in the folder of a partial mirror."""

DAMAGED = re.compile(
    r"does not match index|corrupt|inflate|unable to read|bad object|loose object|error in object"
)
"""What git says of a repository of ours that may be damaged; whether it is, `damage` says."""

_REMOTE = "upstream"
_FILTER = "blob:none"
_HEAD = re.compile(r"^ref: refs/heads/(\S+)\tHEAD$", re.MULTILINE)
_MOST_FILES = 200_000
"""Files of one commit that are fetched at once."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How much of a remote is wanted. `depth` counts commits, None is all; without `blobs`, files come later."""

    depth: int | None = None
    blobs: bool = True

    def __post_init__(self) -> None:
        if self.depth is not None and not 1 <= self.depth <= 1_000_000:
            raise InvalidInputError(f"a depth is a number of commits from 1 on, not {self.depth}")
        if self.depth is not None and not self.blobs:
            raise InvalidInputError("a mirror is shallow or partial, not both: leave out depth or blobs")


@dataclass(frozen=True, slots=True)
class Mirror:
    """A mirror in the folder `path`. `protocols` are the transports that git may use, `within` its time."""

    path: Path
    remote: Remote
    protocols: str
    within: timedelta

    @property
    def is_partial(self) -> bool:
        """Whether files come when they are read."""
        return (self.path / PARTIAL).exists()

    async def fill(self, shape: Shape) -> None:
        """Fetch all branches and tags as they are at the remote now; what is gone there goes here.

        Raises FailedError where the remote has no such repository or an object that git refuses, UnavailableError
        where it does not answer, GitError for everything else.
        """
        if not shape.blobs:
            (self.path / PARTIAL).touch()
        command = ["fetch", "--quiet", "--prune", "--no-tags", "--no-write-fetch-head"]
        command += ["--no-recurse-submodules", "--update-shallow"]
        command += [f"--depth={shape.depth}"] if shape.depth else []
        command += [] if shape.blobs else [f"--filter={_FILTER}"]
        await self._git([*command, _REMOTE, "+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"])
        await self._follow_head()

    async def _follow_head(self) -> None:
        said = (await self._git(["ls-remote", "--symref", _REMOTE, "HEAD"])).decode(errors="replace")
        found = _HEAD.search(said)
        if found is not None:
            await self._git(["symbolic-ref", "HEAD", f"refs/heads/{found[1]}"])

    async def hydrate(self, tree: str) -> int:
        """Fetch the files of a tree or commit that are not here yet; return how many."""
        listed = await self._git(["rev-list", "--objects", "--missing=print", "--no-walk", tree])
        missing = [line[1:] for line in listed.decode(errors="replace").splitlines() if line.startswith("?")]
        await self.bring(missing)
        return len(missing)

    async def bring(self, missing: Sequence[str]) -> None:
        """Fetch files by their ids, all in one request."""
        if len(missing) > _MOST_FILES:
            raise FailedError(f"a commit has {len(missing)} files to be fetched, more than {_MOST_FILES}")
        if missing:
            command = ["-c", "fetch.negotiationAlgorithm=noop", "fetch", "--quiet", "--no-tags"]
            command += ["--no-write-fetch-head", "--recurse-submodules=no", f"--filter={_FILTER}", "--stdin"]
            await self._git([*command, _REMOTE], stdin="\n".join(missing).encode() + b"\n")

    def environment(self, settings: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of a git process that may fetch from the remote."""
        url, credentials = self.remote.url, None
        if self.remote.credentials is not None:
            credentials = Credentials(*self.remote.credentials)
        values = {**git_commands.verified("fetch"), f"remote.{_REMOTE}.url": url, **(settings or {})}
        if self.is_partial:
            values |= {f"remote.{_REMOTE}.promisor": "true", f"remote.{_REMOTE}.partialclonefilter": _FILTER}
        env = git_commands.environment(values, protocols=self.protocols, url=url, credentials=credentials)
        if self.is_partial:
            # Git serves nothing that it has to fetch first, lest a repository's own settings run a program. These
            # settings are ours.
            env["GIT_NO_LAZY_FETCH"] = "0"
        return env

    async def _git(self, command: Sequence[str], stdin: bytes = b"") -> bytes:
        secrets = [self.remote.credentials[1]] if self.remote.credentials else []
        whole = ["--git-dir", str(self.path), *command]
        try:
            return await git_commands.run(
                whole, self.environment(), within=self.within, secrets=secrets, stdin=stdin
            )
        except GitError as error:
            if NO_REPOSITORY.search(error.stderr):
                raise FailedError(f"there is no repository at {self.remote.url}: {error}") from None
            if REFUSED.search(error.stderr):
                raise FailedError(f"{self.remote.url} has an object that git refuses: {error}") from None
            raise


def promised(path: Path) -> dict[str, str]:
    """Return the settings by which git does not miss what a partial mirror has not; it cannot fetch it by them."""
    return {f"remote.{_REMOTE}.promisor": "true"} if (path / PARTIAL).exists() else {}


async def damage(path: Path, within: timedelta) -> str | None:
    """Read every object of a repository; return what is wrong with them, None where nothing is.

    What a shallow or partial mirror never had is not missed.
    """
    command = ["--git-dir", str(path), "fsck", "--full", "--no-dangling", "--no-progress", "--no-reflogs"]
    try:
        await git_commands.run(command, git_commands.environment(promised(path)), within=within)
    except GitError as error:
        return str(error)
    return None

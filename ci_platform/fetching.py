"""Fetch one commit of a remote repository into a mirror, as little as the remote allows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from ci_platform import git_commands
from ci_platform.errors import FailedError, UnavailableError
from ci_platform.git_commands import Credentials, GitError

_MISSING = re.compile(r"not our ref|find remote ref|unadvertised object|does not allow request|bad object")
NO_REPOSITORY = re.compile(r"repository .* not found|does not exist|not appear to be a git repository")
"""What git says where there is no such repository."""

REFUSED = re.compile(r"fsck error")
"""What git says where it refuses an object."""

_INFINITE = "2147483647"


@dataclass(frozen=True, slots=True)
class Remote:
    """Where a repository can be fetched from. `credentials` are a user and a password or token.

    `proxy` is the only way there, where one is named: see `ci_platform.guarded`.
    """

    url: str
    credentials: tuple[str, str] | None = None
    proxy: str | None = None

    def __repr__(self) -> str:
        return f"Remote(url={git_commands.redact(self.url)!r})"


@dataclass(frozen=True, slots=True)
class Fetch:
    """One commit to get into the mirror at `path`. `protocols` are the transports git may use."""

    path: Path
    repo: str
    sha: str
    ref: str | None
    remote: Remote
    protocols: str
    within: timedelta

    async def __call__(self, arrived: Callable[[], Awaitable[bool]]) -> None:
        """Try one way after the other until `arrived`.

        Raises FailedError where the remote has no such commit or repository, UnavailableError where it does
        not answer, refuses the credentials or takes too long.
        """
        said = ""
        for specification, depth in _ways(self.sha, self.ref):
            try:
                await self._run(specification, depth)
            except GitError as error:
                said = str(error)
                if NO_REPOSITORY.search(error.stderr):
                    raise FailedError(f"{self.repo!r} is not to be found at its forge: {said}") from None
                if REFUSED.search(error.stderr):
                    raise FailedError(f"{self.repo!r} has an object that git refuses: {said}") from None
                if not _MISSING.search(error.stderr):
                    raise UnavailableError(f"fetching {self.repo!r} failed: {said}") from None
            if await arrived():
                return
        raise FailedError(
            f"{self.repo!r} has no commit {self.sha} (any more)" + (f": {said}" if said else "")
        )

    async def _run(self, specification: str, depth: str) -> None:
        url, credentials = self.remote.url, None
        if self.remote.credentials is not None:
            credentials = Credentials(*self.remote.credentials)
        env = git_commands.environment(
            git_commands.verified("fetch"),
            protocols=self.protocols,
            url=url,
            credentials=credentials,
            proxy=self.remote.proxy,
        )
        command = ["--git-dir", str(self.path), "fetch", "--quiet", "--no-tags", "--no-write-fetch-head"]
        command += ["--no-recurse-submodules", f"--depth={depth}"]
        command += [*(["--prune"] if "*" in specification else []), "--", url, specification]
        secrets = [credentials.password] if credentials else []
        await git_commands.run(command, env, within=self.within, secrets=secrets)


def _ways(sha: str, ref: str | None) -> list[tuple[str, str]]:
    """Return refspec and depth of each way to a commit, cheapest first."""
    # A name made from the ref's: remote branches `a` and, later, `a/b` cannot both be stored as they are.
    name = f"refs/dynflow/{hashlib.sha256((ref or sha).encode()).hexdigest()[:16]}"
    ways = [(f"+{sha}:{name}", "1")]
    if ref is not None:
        ways += [(f"+{ref}:{name}", "1"), (f"+{ref}:{name}", _INFINITE)]
    return [*ways, ("+refs/heads/*:refs/dynflow/heads/*", _INFINITE)]

"""`env.ARTIFACTS`: workspaces, history and artifacts. Each method authorises for *this* run, then delegates."""

from __future__ import annotations

import builtins
from typing import Any

from ci_platform.artifacts import Artifacts, Wanted
from ci_platform.artifacts.asking import checked_folder, checked_name, checked_upload
from ci_platform.cancellation import with_shields
from ci_platform.capabilities import RunIdentity, calling, workspace_of
from ci_platform.errors import InvalidInputError, PlatformError
from ci_platform.logs import LogKey, Logs
from ci_platform.repository_capability import RepositoryCapability
from ci_platform.source import Source
from ci_platform.stacks import LayerAuthor
from ci_platform.workspaces import Workspaces
from pipelines.contract import Artifact

_LONGEST_LIST = 1000
_LONGEST_BRANCH = 1024


class KeepingCapability(RepositoryCapability):
    """What a run may keep, and take of what was kept."""

    def __init__(self, workspaces: Workspaces, source: Source, artifacts: Artifacts, logs: Logs) -> None:
        super().__init__(workspaces, source)
        self._artifacts, self._logs = artifacts, logs

    async def upload(
        self,
        name: Any,
        workspace: Any,
        paths: Any,
        *,
        exclude: Any = (),
        retention: Any = None,
        replace: Any = False,
        missing_ok: Any = False,
        failed: Any = None,
    ) -> Artifact | None:
        """Keep the files of `workspace` that match `paths`, and not `exclude`, as the run's artifact `name`.

        A pattern that is a folder stands for all that is in it; one that matches nothing fails the step unless
        `missing_ok`: then it may be that there is no artifact, and None is returned. They are kept for `retention`,
        such as "7 days". A name that the run has already is a ConflictError unless `replace`; the step's own earlier
        attempts do not count. `failed` is the name of a step whose command failed: what it left is kept, which is no
        part of the workspace.
        """
        identity, author = calling("ARTIFACTS.upload")
        upload = checked_upload(
            name,
            paths,
            exclude=exclude,
            retention=retention,
            replace=replace,
            missing_ok=missing_ok,
            failed=failed,
            retentions=self._artifacts.limits.retentions,
        )
        own = workspace_of(workspace, identity)
        made = await with_shields(lambda: self._artifacts.upload(identity, author, own.id, upload))
        if made is None:
            self._say(identity, author, f"artifact {upload.name!r}: nothing matches, and nothing is kept")
        else:
            until = f"{made.expires_at:%Y-%m-%d %H:%M} UTC"
            self._say(
                identity, author, f"artifact {made.name!r}: kept {_amount(made)} until {until}, {made.digest}"
            )
        return made

    async def download(
        self, name: Any, workspace: Any, *, path: Any = "", run: Any = None, branch: Any = None
    ) -> Artifact:
        """Put the files of the artifact `name` into `workspace`, below the folder `path`.

        It is one of this run, or of `run` (an id), or of the newest run of `branch` that succeeded and has it. An
        Artifact in the place of a name says all of it. A fork's pull request may have its own alone.
        """
        identity, author = calling("ARTIFACTS.download")
        if isinstance(name, Artifact) and run is None and branch is None:
            name, run = name.name, name.run
        wanted = _wanted(checked_name(name), run, branch)
        own, folder = workspace_of(workspace, identity), checked_folder(path)
        found = await with_shields(lambda: self._artifacts.download(identity, author, own.id, wanted, folder))
        of = "" if found.run == identity.run_id else f" of run {found.run}"
        self._say(identity, author, f"artifact {found.name!r}{of}: {_amount(found)}, {found.digest}")
        return found

    async def list(
        self, *, run: Any = None, branch: Any = None, name: Any = None, limit: Any = 100
    ) -> builtins.list[Artifact]:
        """Return the artifacts of this run, of `run`, or of runs of `branch` that succeeded, the newest first.

        With `name` those of that name; up to 1,000.
        """
        identity, _ = calling("ARTIFACTS.list")
        if type(limit) is not int or not 1 <= limit <= _LONGEST_LIST:
            raise InvalidInputError(f"limit is a number from 1 to {_LONGEST_LIST:,}, not {limit!r:.20}")
        wanted = _wanted(None if name is None else checked_name(name), run, branch)
        return await self._artifacts.find(identity, wanted, limit)

    def _say(self, identity: RunIdentity, author: LayerAuthor, line: str) -> None:
        """Write a line into the step's log. The artifact is there: no trouble with the log makes that untrue."""
        try:
            log = self._logs.writer(LogKey(identity.run_id, author.step, author.count))
        except PlatformError:
            return
        try:
            log.note("notice", line)
        finally:
            log.finish()


def _wanted(name: str | None, run: Any, branch: Any) -> Wanted:
    for what, value in (("run", run), ("branch", branch)):
        if value is not None and not (
            isinstance(value, str) and 0 < len(value) <= _LONGEST_BRANCH and value.isprintable()
        ):
            raise InvalidInputError(f"{what}= is text, not {value!r:.100}")
    return Wanted(name, run, branch)


def _amount(artifact: Artifact) -> str:
    files = "1 file" if artifact.files == 1 else f"{artifact.files:,} files"
    return f"{files}, {artifact.size:,} bytes"

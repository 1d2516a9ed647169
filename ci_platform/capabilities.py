"""The whole surface that a pipeline can reach. Each method authorises for *this* run, then delegates.

Who calls is `current_caller`, bound by the host when it loaded the run's code: nothing that pipeline code says
about itself counts. Values out of the isolate are hostile until checked here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from ci_platform.caches.specs import checked as check_caches
from ci_platform.cancellation import with_shields
from ci_platform.cones import Cone
from ci_platform.errors import FailedError, ForbiddenError, InvalidInputError, NotFoundError
from ci_platform.execution import Execution
from ci_platform.lineage import in_run, workspace_id_of
from ci_platform.reports import Reports
from ci_platform.service_checks import check_services
from ci_platform.settings import Settings
from ci_platform.workspaces import LayerAuthor, Workspaces
from dynflow.isolates import Caller, Capability, current_caller
from dynflow.types import StepContext
from pipelines.contract import Command, CommandResult, Workspace

_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# A Markdown comment is at most this long at GitHub; the report says where it was cut.
_LONGEST_COMMENT = 65_536


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What a run may be taken for: bound by the platform when it loads the run's pipeline, never told by it.

    `trusted` is false for a pull request from a fork. `code` is the commit of its pipeline's code where that is not
    `sha`. `ancestors` are the runs that it was forked from, of which it has copies of workspaces.
    """

    run_id: str
    repo: str
    sha: str
    pr: int | None
    trusted: bool
    code: str | None = None
    ancestors: tuple[str, ...] = ()

    @property
    def is_what_if(self) -> bool:
        """Whether it tries something out: nothing of it may be taken for what its commit does."""
        return bool(self.ancestors)


def _identity() -> tuple[RunIdentity, Caller]:
    caller = current_caller.get()
    if not isinstance(caller.props, RunIdentity):
        raise ForbiddenError("this capability belongs to runs of pipelines")
    return caller.props, caller


def _in_step(caller: Caller, what: str) -> StepContext:
    if caller.step is None:
        raise FailedError(f"{what} belongs into a step: await step.do(name, lambda: …)")
    return caller.step


def _author(step: StepContext) -> LayerAuthor:
    return LayerAuthor(step=step.step.name, count=step.step.count, attempt=step.attempt)


def calling(what: str) -> tuple[RunIdentity, LayerAuthor]:
    """Return which run calls, and from which of its steps. Raises ForbiddenError, FailedError outside of a step."""
    identity, caller = _identity()
    return identity, _author(_in_step(caller, what))


def workspace_of(workspace: Any, identity: RunIdentity) -> Workspace:
    """Return a workspace that is this run's. Raises InvalidInputError, ForbiddenError."""
    if not isinstance(workspace, Workspace):
        raise InvalidInputError(f"not a workspace: {type(workspace).__name__}")
    workspace_id: Any = workspace.id  # its class promises text; what came through the wire does not
    own = in_run(workspace_id, identity.run_id, identity.ancestors) if isinstance(workspace_id, str) else None
    if own is None:
        raise ForbiddenError(f"workspace {workspace_id!r:.100} does not belong to this run")
    return replace(workspace, id=own)


class ArtifactsCapability(Capability):
    """`env.ARTIFACTS`: workspaces of this run's repository."""

    def __init__(self, workspaces: Workspaces) -> None:
        self._workspaces = workspaces

    async def fork(
        self, repo: Any, sha: Any = None, *, submodules: Any = False, lfs: Any = False, sparse: Any = None
    ) -> Workspace:
        """Fork a copy-on-write workspace of this run's repository at `sha` (default: the run's commit).

        `sparse` is a list of folders: these alone, and the files above them, are on disk. With `submodules` their files
        are in it, with `lfs` those that LFS keeps. Repeating a call in
        the same step gives the same workspace. A run of a fork's pull request reaches only its own commit.
        """
        identity, caller = _identity()
        step = _in_step(caller, "ARTIFACTS.fork")
        if repo != identity.repo:
            raise ForbiddenError(f"this run belongs to {identity.repo!r} and cannot read {repo!r:.100}")
        commit = identity.sha if sha is None else sha
        if not isinstance(commit, str) or not _SHA.fullmatch(commit):
            raise InvalidInputError(
                f"sha must be a full commit id of 40 or 64 hexadecimal digits, not {sha!r:.100}"
            )
        if commit != identity.sha and not identity.trusted:
            raise ForbiddenError(f"a pull request from a fork may read its own commit {identity.sha} only")
        with_modules, with_lfs = _flag("submodules", submodules), _flag("lfs", lfs)
        cone = None if sparse is None else Cone.of(sparse)
        workspace_id = workspace_id_of(identity.run_id, step.step.name, step.step.count)
        return await with_shields(
            lambda: self._workspaces.fork(
                workspace_id,
                identity.repo,
                commit,
                cone=cone,
                alone=not identity.trusted,
                submodules=with_modules,
                lfs=with_lfs,
            )
        )

    async def fork_snapshot(self, workspace: Any, step: Any, count: Any = 1) -> Workspace:
        """Fork one of this run's workspaces as it stood right after a step (the `count`th of that name).

        NotFoundError where that step changed nothing in it, or its changes were taken back.
        """
        identity, caller = _identity()
        own = _in_step(caller, "ARTIFACTS.fork_snapshot")
        if not isinstance(step, str) or not isinstance(count, int):
            raise InvalidInputError(
                f"a step is named by text and a number, not {step!r:.100} and {count!r:.20}"
            )
        source_id = workspace_of(workspace, identity).id
        workspace_id = workspace_id_of(identity.run_id, own.step.name, own.step.count)
        return await with_shields(lambda: self._fork_snapshot(workspace_id, source_id, step, count))

    async def _fork_snapshot(self, workspace_id: str, source_id: str, step: str, count: int) -> Workspace:
        found = await self._workspaces.snapshots(source_id)
        names = [
            each.name
            for each in found
            if each.outcome == "committed" and (each.step, each.count) == (step, count)
        ]
        if not names:
            raise NotFoundError(f"the step {step[:100]!r} number {count} left nothing in that workspace")
        return await self._workspaces.fork_snapshot(workspace_id, source_id, names[-1])


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidInputError(f"ARTIFACTS.fork({name}=…) is True or False, not {value!r:.20}")
    return value


class SandboxCapability(Capability):
    """`env.SANDBOX`: commands over this run's workspaces."""

    def __init__(self, execution: Execution, settings: Settings) -> None:
        self._execution, self._settings = execution, settings

    async def run(self, command: Any) -> CommandResult:
        """Run a command to its end and return how it ended; its output goes to the step's log as it comes."""
        identity, caller = _identity()
        step = _in_step(caller, "run_in_sandbox")
        checked = self._checked(command, identity)
        author = _author(step)
        return await with_shields(lambda: self._execution.run(checked, run_id=identity.run_id, author=author))

    def _checked(self, command: Any, identity: RunIdentity) -> Command:
        if not isinstance(command, Command) or not isinstance(command.workspace, Workspace):
            raise InvalidInputError(f"SANDBOX.run takes a Command, not {type(command).__name__}")
        workspace = workspace_of(command.workspace, identity)
        if command.sandbox == "container" and not self._settings.allow_containers:
            raise ForbiddenError(
                'sandbox="container" is switched off on this platform (setting allow_containers)'
            )
        check_services(command.services, command.sandbox)
        check_caches(command.cache)
        images = {command.image, *(service.image for service in command.services)}
        if images - {None, self._settings.container_image} and not identity.trusted:
            # Any image of the host's engine could be named, also one that was never meant to be read.
            raise ForbiddenError("pull requests from forks run in the platform's own image: leave out image=")
        if command.network and not (self._settings.allow_network and identity.trusted):
            why = (
                "for pull requests from forks" if self._settings.allow_network else "(setting allow_network)"
            )
            raise ForbiddenError(f"network={command.network!r:.100} is not allowed here {why}")
        return replace(command, workspace=workspace)


class ForgeCapability(Capability):
    """`env.GITHUB` (and `env.FORGE`): what a run may say on its forge."""

    def __init__(self, reports: Reports) -> None:
        self._reports = reports

    async def comment_on_pr(self, repo: Any, pr: Any, body: Any) -> None:
        """Put `body` (Markdown) into the run's one comment on its pull request, in place of what was there.

        Returns once that is stored; it is delivered in order, exactly once in effect, while the run goes on.
        """
        identity, caller = _identity()
        _in_step(caller, "GITHUB.comment_on_pr")
        if repo != identity.repo or pr != identity.pr or identity.pr is None:
            raise ForbiddenError(
                f"this run may comment on pull request {identity.pr!r} of {identity.repo!r}, "
                f"not on {pr!r:.20} of {repo!r:.100}"
            )
        if not isinstance(body, str) or not 1 <= len(body) <= _LONGEST_COMMENT:
            raise InvalidInputError(
                f"a comment is text of 1 to {_LONGEST_COMMENT:,} characters, not {body!r:.100}"
            )
        await self._reports.comment(identity.run_id, identity.pr, body)

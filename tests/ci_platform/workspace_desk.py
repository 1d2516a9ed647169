"""Workspaces with commands in real sandboxes: what tests of forks, layers and snapshots share."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ci_platform import copy_on_write, layers
from ci_platform.copy_on_write import MethodName
from ci_platform.hydration.plan import Threshold
from ci_platform.sandboxes import Sandbox, SandboxJob
from ci_platform.sandboxes.isolate import IsolateSandbox
from ci_platform.source import Remote, Source
from ci_platform.trees import TreeLimits
from ci_platform.workspaces import CommitReport, LayerAuthor, Workspaces
from tests.ci_platform.git_repositories import WorkingCopy, working_copy

REPO = "ada/engine"


@dataclass
class Desk:
    """One repository, its forks, and what commands in them print."""

    root: Path
    remote: WorkingCopy
    source: Source
    workspaces: Workspaces
    sandbox: Sandbox
    reports: list[CommitReport] = field(default_factory=list)
    _jobs: int = 0

    async def fork(self, sha: str, workspace_id: str = "run1.build", **how: Any) -> str:
        await self.fetch(sha)
        await self.workspaces.fork(workspace_id, REPO, sha, **how)
        return workspace_id

    async def fetch(self, sha: str) -> None:
        """With all of history, tags and branches, as a repository of our own has them."""
        if not await self.source.exists(REPO):
            await self.source.create(REPO)
        self.remote.git("push", "--quiet", "--force", "--mirror", str(self.source.path(REPO)))
        await self.source.fetch(REPO, sha, Remote(self.remote.url))

    async def run(
        self, script: str, workspace_id: str = "run1.build", step: str = "step", *, keep: bool = False
    ) -> str:
        """Run a script to success, keep what it changed, return what it printed."""
        tree = await self.workspaces.prepare(workspace_id, LayerAuthor(step, 1, 1), lazy=True)
        self._jobs += 1
        printed = bytearray()
        try:
            job = SandboxJob(f"desk-{os.getpid()}-{self._jobs}", ("sh", "-ec", script), tree)
            outcome = await self.sandbox.run(job, printed.extend)
            assert outcome.exit_code == 0, printed.decode(errors="replace")
            self.reports.append(await self.workspaces.commit(tree))
        finally:
            await self.workspaces.drop(tree, keep=keep)
        return printed.decode(errors="surrogateescape")


@asynccontextmanager
async def opened_desk(
    tmp_path: Path,
    *,
    limits: TreeLimits | None = None,
    method: MethodName | None = None,
    toolchains: Sequence[Path] = (),
    lazy: Threshold | None = None,
) -> AsyncIterator[Desk]:
    for folder in [tmp_path, *tmp_path.parents][:2]:
        folder.chmod(0o755)
    remote = working_copy(tmp_path / "remote")
    source = Source(tmp_path / "source", allow_file=True, limits=limits, lazy=lazy)
    chosen = copy_on_write.probe(tmp_path / "workspaces", method)
    workspaces = Workspaces(tmp_path / "workspaces", source, chosen)
    sandbox = IsolateSandbox(toolchains=toolchains)
    try:
        yield Desk(tmp_path, remote, source, workspaces, sandbox)
    finally:
        await sandbox.close()
        await source.close()
        layers.remove_tree(tmp_path / "workspaces")
        layers.remove_tree(tmp_path / "source")

"""What runs have on disk, as far as a rerun takes it back: their workspaces and their artifacts."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractAsyncContextManager

from ci_platform.artifacts import Artifacts
from ci_platform.workspaces import Workspaces


class RunFiles:
    """Both together. Errors are those of each; every call may be repeated."""

    def __init__(self, workspaces: Workspaces, artifacts: Artifacts) -> None:
        self._workspaces, self._artifacts = workspaces, artifacts

    async def rewind_run(self, run_id: str, steps: Collection[tuple[str, int]]) -> None:
        """Forget what these steps (name, count) changed in the run's workspaces, and delete what they uploaded."""
        await self._workspaces.rewind_run(run_id, steps)
        await self._artifacts.rewind_run(run_id, steps)

    async def delete_run(self, run_id: str) -> None:
        """Remove the run's workspaces and artifacts."""
        await self._workspaces.delete_run(run_id)
        await self._artifacts.delete_run(run_id)

    def rerunning(self, run_id: str) -> AbstractAsyncContextManager[None]:
        """Keep the run's workspaces until it is open again; ConflictError where they were collected."""
        return self._workspaces.rerunning(run_id)

"""Runs that upload and download artifacts, with workspaces and commands: what tests of artifacts share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from ci_platform.artifacts import Artifacts, Limits
from ci_platform.artifacts.capability import KeepingCapability
from ci_platform.artifacts.shelf import Shelf
from ci_platform.capabilities import RunIdentity
from ci_platform.copy_on_write import MethodName
from ci_platform.model import Run
from ci_platform.store import col
from dynflow.clock import ManualClock
from pipelines.contract import Artifact, Workspace
from tests.ci_platform import cache_desk
from tests.ci_platform.cache_desk import REPO, RUNS, CacheDesk
from tests.ci_platform.test_capabilities import called_by

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class ArtifactDesk:
    """A platform's part that keeps artifacts, over one folder."""

    desk: CacheDesk
    artifacts: Artifacts
    env: KeepingCapability
    clock: ManualClock
    shelf: Path

    async def workspace(self, of: str = "main") -> Workspace:
        return await self.desk.workspaces.fork(f"{of}.fork", RUNS[of].get("repo", REPO), self.desk.sha)

    async def make(self, script: str, of: str = "main", step: str = "") -> None:
        """Have a command of a run change its workspace."""
        result = await self.desk.run(script, of=of, step=step)
        assert result.ok, result.output

    def identity(self, of: str, ancestors: tuple[str, ...] = ()) -> RunIdentity:
        known = RUNS.get(of, {})
        trusted = known.get("trusted", True)
        repo = known.get("repo", REPO)
        return RunIdentity(of, repo, self.desk.sha, known.get("pr"), trusted, ancestors=ancestors)

    async def upload(
        self,
        name: str,
        *paths: str,
        of: str = "main",
        step: str = "keep",
        attempt: int = 1,
        ancestors: tuple[str, ...] = (),
        **options: Any,
    ) -> Artifact:
        workspace = await self.workspace(of)
        with called_by(self.identity(of, ancestors), step=step, attempt=attempt):
            made: Any = await self.env.upload(name, workspace, list(paths), **options)
        return cast("Artifact", made)  # None is what `missing_ok` may give

    async def download(
        self,
        name: Any,
        of: str = "main",
        step: str = "fetch",
        ancestors: tuple[str, ...] = (),
        **options: Any,
    ) -> Artifact:
        workspace = await self.workspace(of)
        with called_by(self.identity(of, ancestors), step=step):
            return await self.env.download(name, workspace, **options)

    async def listed(
        self, of: str = "main", ancestors: tuple[str, ...] = (), **options: Any
    ) -> list[tuple[str, str]]:
        with called_by(self.identity(of, ancestors)):
            return [(each.run, each.name) for each in await self.env.list(**options)]

    async def shown(self, script: str, of: str = "main") -> str:
        """What a command over the run's workspace prints."""
        return (await self.desk.run(script, of=of)).output

    async def paths(self, name: str, of: str = "main") -> list[str]:
        async with self.artifacts.opened(of, name) as opened:
            return [entry.path for entry in opened.entries]

    async def change(self, run_id: str, **values: Any) -> None:
        await self.desk.store.write(lambda tx: tx.change(Run, values, col(Run.id) == run_id))

    def on_disk(self) -> list[str]:
        """Return the artifacts on disk, and what is left of others."""
        return sorted(path.name for path in [*self.shelf.glob("[!.]*/[!.]*"), *self.shelf.glob(".*/*")])

    def objects(self) -> int:
        return len(list(self.shelf.glob("*/.objects/*")))


@asynccontextmanager
async def opened_desk(
    root: Path,
    *,
    limits: Limits | None = None,
    method: MethodName | None = None,
    durable: bool = False,
    disk: Path | None = None,
) -> AsyncIterator[ArtifactDesk]:
    async with cache_desk.opened_desk(root, method=method) as desk:
        clock, shelf = ManualClock(NOW), Shelf((disk or root) / "artifacts", durable)
        artifacts = Artifacts(shelf, desk.store, clock, desk.workspaces, limits=limits)
        await artifacts.sweep()
        env = KeepingCapability(desk.workspaces, desk.workspaces._source, artifacts, desk.logs)
        yield ArtifactDesk(desk, artifacts, env, clock, shelf.root)

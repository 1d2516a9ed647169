"""Commands with caches in real sandboxes, of runs that a database knows: what tests of caches share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ci_platform import copy_on_write
from ci_platform.caches import Budget, CacheEntry, Caches
from ci_platform.copy_on_write import MethodName
from ci_platform.execution import Execution
from ci_platform.hydration.plan import Threshold
from ci_platform.logs import LogKey, Logs
from ci_platform.model import Repository, Run, RunCache
from ci_platform.sandboxes import Sandbox
from ci_platform.sandboxes.isolate import IsolateSandbox
from ci_platform.source import Remote, Source
from ci_platform.store import Store, col
from ci_platform.survival import Survival
from ci_platform.workspaces import LayerAuthor, Workspaces
from dynflow.clock import SystemClock
from pipelines.contract import CacheSpec, Command, CommandResult, SandboxKind
from tests.ci_platform.git_repositories import WorkingCopy, working_copy

REPO, OTHER = "ada/engine", "eve/engine"
FILES = {"README.md": b"hello\n", "requirements.txt": b"six==1.16\n", "sub/lock.json": b"{}\n"}
RUNS: dict[str, dict[str, Any]] = {
    "main": {"ref": "refs/heads/main"},
    "feature": {"ref": "refs/heads/feature"},
    "release": {"ref": "refs/heads/release"},
    "tag": {"ref": "refs/tags/v1"},
    "pull": {"ref": "refs/pull/7/head", "event": "pull_request", "pr": 7, "base_branch": "main"},
    "torelease": {"ref": "refs/pull/8/head", "event": "pull_request", "pr": 8, "base_branch": "release"},
    "fork": {
        "ref": "refs/pull/9/head",
        "event": "pull_request",
        "pr": 9,
        "base_branch": "main",
        "trusted": False,
    },
    "insider": {"ref": "refs/pull/9/head", "event": "pull_request", "pr": 9, "base_branch": "main"},
    "pretender": {"ref": "refs/heads/main", "pr": 9, "trusted": False},
    "other": {"ref": "refs/heads/main", "repo": OTHER},
}
"""Runs, by what they are of; each has a workspace."""


def spec(key: str, *paths: str, restore: tuple[str, ...] = ()) -> CacheSpec:
    return CacheSpec(key, paths or ("deps",), restore)


@dataclass
class CacheDesk:
    """What of a platform runs commands with caches, over one folder."""

    root: Path
    store: Store
    workspaces: Workspaces
    caches: Caches
    logs: Logs
    execution: Execution
    sha: str
    _steps: int = 0

    async def run(
        self, script: str, *cache: CacheSpec, of: str = "main", step: str = "", **options: Any
    ) -> CommandResult:
        """Run a script in the workspace of a run; in a step of its own where none is named."""
        self._steps += 1
        self.step = step or f"step{self._steps}"
        workspace = await self.workspaces.fork(f"{of}.fork", RUNS[of].get("repo", REPO), self.sha)
        attempt = options.pop("attempt", 1)
        command = Command(workspace, ("sh", "-ec", script), cache=cache, **options)
        return await self.execution.run(command, run_id=of, author=LayerAuthor(self.step, 1, attempt))

    async def said(self, of: str = "main", step: str = "") -> list[str]:
        """What the log of a step (the last one) says of caches."""
        chunk = await self.logs.read(LogKey(of, step or self.step, 1))
        texts = [line.text for line in chunk.lines if line.kind == "notice"]
        return [text.removeprefix("cache: ") for text in texts if text.startswith("cache: ")]

    async def records(self, of: str = "main") -> list[tuple[str, str, str | None]]:
        """What the run's record says: key, outcome, what became of it."""
        rows = await self.store.read(
            lambda tx: tx.all(RunCache, col(RunCache.run_id) == of, order=col(RunCache.id))
        )
        return [(row.key, row.outcome, row.saved) for row in rows]

    def keys(self) -> dict[str, CacheEntry]:
        return {entry.key: entry for entry in self.caches.entries()}

    def leftovers(self) -> list[Path]:
        """Return what nobody uses any more and is still there."""
        return [
            path
            for name in (".open", ".trash")
            for path in (self.root / "workspaces/.caches" / name).iterdir()
        ]


async def _rows(store: Store, sha: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)

    def insert(tx: Any) -> None:
        if tx.get(Repository, REPO) is not None:
            return
        for name in (REPO, OTHER):
            tx.add(Repository(name=name, forge="local", created_at=now))
        for number, (run_id, values) in enumerate(RUNS.items()):
            known = {"repo": REPO, "event": "push", **values}
            branch = known["ref"].rpartition("/")[2]
            tx.add(
                Run(id=run_id, number=number, action="push", sha=sha, branch=branch, created_at=now, **known)
            )

    await store.write(insert)


def remote_of(root: Path) -> tuple[str, str]:
    """Return the commit and the URL of the repository that all runs are of, made once."""
    noted = root / "commit"
    if not noted.exists():
        remote: WorkingCopy = working_copy(root / "remote")
        noted.write_text(f"{remote.commit(FILES)} {remote.url}")
    sha, url = noted.read_text().split()
    return sha, url


@asynccontextmanager
async def opened_desk(
    root: Path,
    *,
    method: MethodName | None = None,
    budget: Budget | None = None,
    durable: bool = False,
    container: Sandbox | None = None,
    lazy: Threshold | None = None,
) -> AsyncIterator[CacheDesk]:
    """Start over `root`, as a platform does, and end as one that is told to stop."""
    for folder in [root, *root.parents][:2]:
        folder.chmod(0o755)
    sha, url = remote_of(root)
    source = Source(root / "source", allow_file=True, lazy=lazy)
    for repo in (REPO, OTHER):
        await source.fetch(repo, sha, Remote(url))
    chosen = copy_on_write.probe(root / "workspaces", method)
    workspaces = Workspaces(root / "workspaces", source, chosen, durable=durable)
    store, logs, sandbox = Store(f"sqlite:///{root / 'platform.db'}"), Logs(root / "logs"), IsolateSandbox()
    await store.open()
    await _rows(store, sha)
    caches = Caches(root / "workspaces/.caches", chosen, store, SystemClock(), budget=budget, durable=durable)
    sandboxes: dict[SandboxKind, Sandbox] = {"isolate": sandbox}
    if container is not None:
        sandboxes["container"] = container
    execution = Execution(workspaces, logs, sandboxes, survival=Survival(root / "commands"), caches=caches)
    try:
        await execution.recover(list(RUNS))
        await workspaces.sweep(list(RUNS))
        await caches.sweep()
        yield CacheDesk(root, store, workspaces, caches, logs, execution, sha)
    finally:
        for each in sandboxes.values():
            await each.close()
        await source.close()
        await store.close()

"""A forge, the platform's git store with what it knows of access, and workspaces: for submodules and LFS."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ci_platform import copy_on_write, layers
from ci_platform.copy_on_write import MethodName
from ci_platform.encryption import Encryption
from ci_platform.forges.github import GitHubForge
from ci_platform.forges.local import LocalForge
from ci_platform.grafts import Grafts
from ci_platform.guarded import Guard
from ci_platform.imports import Imports
from ci_platform.lfs_fetching import LfsFetching
from ci_platform.module_access import ModuleAccess
from ci_platform.remotes import Remotes
from ci_platform.repositories import Repositories
from ci_platform.sandboxes import SandboxJob
from ci_platform.sandboxes.isolate import IsolateSandbox
from ci_platform.source import Source
from ci_platform.store import Store
from ci_platform.workspaces import LayerAuthor, Workspaces
from dynflow.clock import ManualClock
from tests.ci_platform.forge_server import TOKEN, ForgeServer, forge_server
from tests.ci_platform.git_repositories import WorkingCopy

REPO, OWN = "ada/app", "http://ci.example.org"


@dataclass
class Platform:
    forge: ForgeServer
    repositories: Repositories
    imports: Imports
    source: Source
    workspaces: Workspaces
    sandbox: IsolateSandbox
    access: ModuleAccess
    _forks: int = 0
    _jobs: int = 0

    async def register(self, name: str, **how: Any) -> WorkingCopy:
        """A repository at the forge that the platform knows, and has credentials for."""
        await self.repositories.register(name, forge="github", **how)
        return self.forge.repository(name)

    async def fork(self, sha: str, repo: str = REPO, **how: Any) -> str:
        self._forks += 1
        workspace_id = f"run{self._forks}.fork"
        remote = await self.source._remote_of(repo)
        if remote is not None:
            await self.source.fetch(repo, sha, remote)
        await self.workspaces.fork(workspace_id, repo, sha, **({"submodules": True} | how))
        return workspace_id

    async def run(self, workspace_id: str, script: str) -> str:
        tree = await self.workspaces.prepare(workspace_id, LayerAuthor("step", 1, self._jobs + 1))
        self._jobs += 1
        printed = bytearray()
        try:
            job = SandboxJob(f"grafting-{os.getpid()}-{self._jobs}", ("sh", "-ec", script), tree)
            outcome = await self.sandbox.run(job, printed.extend)
            assert outcome.exit_code == 0, printed.decode(errors="replace")
        finally:
            await self.workspaces.drop(tree)
        return printed.decode(errors="surrogateescape")

    def with_guard(self, guard: Guard) -> None:
        lfs = LfsFetching(self.source, self.source._remote_of, guard, most=1 << 20)
        self.workspaces._grafts = Grafts(self.source, self.access, guard, lfs)


@asynccontextmanager
async def opened_platform(tmp_path: Path, method: MethodName | None = None) -> AsyncIterator[Platform]:
    store, clock = Store(f"sqlite:///{tmp_path / 'platform.db'}"), ManualClock()
    await store.open()
    for folder in [tmp_path, *tmp_path.parents][:2]:
        folder.chmod(0o755)
    with forge_server(tmp_path / "forge") as forge:
        forges = {
            "github": GitHubForge(url=forge.url, token=TOKEN),
            "local": LocalForge(store, clock, lambda repo: f"{OWN}/git/{repo}.git"),
        }
        repositories = Repositories(store, forges, clock)
        encryption = Encryption(tmp_path / "encryption.key")
        imports = Imports(store, clock, repositories=repositories, encryption=encryption, allow_file=True)
        remotes = Remotes(repositories, imports, forges)
        source = Source(tmp_path / "source", allow_file=True, remote_of=remotes)
        access = ModuleAccess(repositories, remotes, OWN)
        guard = Guard([forge.host])
        lfs = LfsFetching(source, remotes, guard, most=1 << 20)
        grafts = Grafts(source, access, guard, lfs)
        chosen = copy_on_write.probe(tmp_path / "workspaces", method)
        workspaces = Workspaces(tmp_path / "workspaces", source, chosen, grafts=grafts)
        sandbox = IsolateSandbox()
        try:
            yield Platform(forge, repositories, imports, source, workspaces, sandbox, access)
        finally:
            await sandbox.close()
            await store.close()
            layers.remove_tree(tmp_path / "workspaces")
            layers.remove_tree(tmp_path / "source")

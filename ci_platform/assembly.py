"""The composition root: settings in, a running platform out. The only importer of implementations."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import anyio
import anyio.abc

from ci_platform import copy_on_write, data_lock, isolation, services
from ci_platform.access import Access
from ci_platform.admission import Admission
from ci_platform.artifacts import Artifacts
from ci_platform.artifacts.capability import KeepingCapability
from ci_platform.caches import Caches
from ci_platform.capabilities import ForgeCapability, SandboxCapability
from ci_platform.command_limits import limits_of
from ci_platform.deliveries import Deliveries
from ci_platform.engines import PlatformEngine, make_engine
from ci_platform.execution import Execution
from ci_platform.forges import Forge
from ci_platform.forges.github import GitHubForge
from ci_platform.forges.local import LocalForge
from ci_platform.garbage.collector import Collector
from ci_platform.garbage.room_keeper import RoomKeeper
from ci_platform.garbage.stores import room_of, stores_of
from ci_platform.gates import Gates
from ci_platform.git_store import GitStore
from ci_platform.grafts import make_grafts
from ci_platform.hydration.plan import Threshold
from ci_platform.image_capability import ImagesCapability
from ci_platform.image_making import ImageMaking
from ci_platform.images import PinnedImages, read_names
from ci_platform.imports import Imports
from ci_platform.listeners import closing, noticing
from ci_platform.logs import Logs
from ci_platform.notices import Notices
from ci_platform.pipeline_code import PipelineCode
from ci_platform.pushes import Pushes
from ci_platform.refreshing import Refresher
from ci_platform.releases import Releases
from ci_platform.remotes import Remotes
from ci_platform.reports import Reports
from ci_platform.repositories import Repositories
from ci_platform.retention import Retention
from ci_platform.run_files import RunFiles
from ci_platform.run_forks import RunForks, note_calls
from ci_platform.run_instances import RunInstances, StoredIdentities
from ci_platform.runs import Runs
from ci_platform.sandboxes import ImageMaker, Sandbox
from ci_platform.sandboxes.container import ContainerSandbox
from ci_platform.sandboxes.isolate import IsolateSandbox
from ci_platform.settings import Settings, make_data_folder
from ci_platform.source import Source
from ci_platform.store import Store
from ci_platform.survival import Survival
from ci_platform.trees import TreeLimits
from ci_platform.workspace_forks import WorkspaceForks
from ci_platform.workspaces import Workspaces
from dynflow.clock import Clock, SystemClock
from dynflow.isolates import IsolateLimits, ProcessLoader
from dynflow.router import create_dynamic_workflow_entrypoint
from pipelines.contract import SandboxKind

WORKFLOW = "ci"


@dataclass(frozen=True)
class Platform:
    """Everything that runs, for the API, the pages and the command line."""

    settings: Settings
    clock: Clock
    store: Store
    access: Access
    repositories: Repositories
    imports: Imports
    refresher: Refresher
    git_store: GitStore
    deliveries: Deliveries
    pushes: Pushes
    runs: Runs
    gates: Gates
    reports: Reports
    logs: Logs
    source: Source
    workspaces: Workspaces
    caches: Caches
    artifacts: Artifacts
    execution: Execution
    collector: Collector
    room_keeper: RoomKeeper
    sandboxes: Mapping[SandboxKind, Sandbox]
    releases: Releases
    engine: PlatformEngine
    instances: RunInstances
    forges: Mapping[str, Forge]


@asynccontextmanager
async def open_platform(settings: Settings) -> AsyncIterator[Platform]:
    """Open the data folder, recover what was running, and run the platform as long as the block does."""
    make_data_folder(settings)
    with data_lock.held(settings.data):
        store = Store(settings.store_url)
        await store.open()
        try:
            async with _serving(settings, store) as platform:
                yield platform
        finally:
            await store.close()


@asynccontextmanager
async def _serving(settings: Settings, store: Store) -> AsyncIterator[Platform]:
    async with (
        _assembled(settings, SystemClock(), store) as platform,
        anyio.create_task_group() as group,
    ):
        for serve in (
            platform.deliveries.serve,
            platform.reports.serve,
            platform.runs.serve,
            platform.releases.serve,
            platform.refresher.serve,
            platform.room_keeper.serve,
        ):
            group.start_soon(services.kept_up, serve)
        group.start_soon(_housekeeping(platform).serve)
        group.start_soon(platform.execution.see_off, platform.runs.open_ids)
        for sandbox in platform.sandboxes.values():
            group.start_soon(services.swept, sandbox)
        yield platform
        group.cancel_scope.cancel()


@asynccontextmanager
async def _assembled(settings: Settings, clock: Clock, store: Store) -> AsyncIterator[Platform]:
    forges = make_forges(settings, clock, store)
    access, repositories = Access(store, clock), Repositories(store, forges, clock)
    imports = Imports.of(settings, store, clock, repositories)
    remotes = Remotes(repositories, imports, forges)
    source = Source(
        settings.data / "source",
        allow_file=settings.allow_file_remotes,
        remote_of=remotes,
        on_damage=imports.suspect,
        limits=TreeLimits(files=settings.max_tree_files, size=settings.max_tree),
        lazy=Threshold(settings.lazy_files, settings.lazy_size) if settings.lazy_trees else None,
    )
    forced = None if settings.copy_on_write == "auto" else settings.copy_on_write
    method = await anyio.to_thread.run_sync(lambda: copy_on_write.probe(settings.workspaces_path, forced))
    workspaces = Workspaces(
        settings.workspaces_path,
        source,
        method,
        grafts=make_grafts(settings, source, repositories, remotes),
    )
    caches = Caches.of(settings, method, store, clock)
    logs = Logs(settings.logs_path, clock=clock, largest=settings.max_log)
    artifacts = Artifacts.of(settings, store, clock, workspaces)
    sandboxes, notices = make_sandboxes(settings), Notices(clock)
    reports = Reports(
        store,
        clock,
        forges=forges,
        public_url=settings.base_url,
        context=settings.status_context,
        give_up_after=settings.report_for,
    )
    gates = Gates(store, clock, notices)
    engine = await make_engine(settings, clock)
    loader, images = make_loader(settings), PinnedImages(store, clock)
    execution = Execution(
        workspaces,
        logs,
        sandboxes,
        images=images,
        limits=limits_of(settings),
        survival=Survival(settings.data / "commands"),
        caches=caches,
    )
    making = None
    if isinstance(maker := sandboxes.get("container"), ImageMaker):
        making = ImageMaking(
            store,
            clock,
            workspaces=workspaces,
            logs=logs,
            images=images,
            sandbox=maker,
            limits=limits_of(settings),
        )
    env = {
        "ARTIFACTS": KeepingCapability(workspaces, source, artifacts, logs),
        "SANDBOX": SandboxCapability(execution, settings),
        "IMAGES": ImagesCapability(making, settings),
        "GITHUB": ForgeCapability(reports),
        "FORGE": ForgeCapability(reports),
    }
    limits = IsolateLimits(memory=settings.pipeline_memory, busy=settings.pipeline_compute)
    identities = StoredIdentities(store)
    code = PipelineCode(source, loader, identities, env, limits, note=partial(note_calls, store))
    engine.register(WORKFLOW, create_dynamic_workflow_entrypoint(code.load_runner))
    workflows = RunInstances(engine.binding(WORKFLOW), identities)
    releases = Releases([*sandboxes.values(), execution], WORKFLOW)
    for listener in (noticing(notices, WORKFLOW), closing(logs, WORKFLOW), releases.listen):
        engine.add_listener(listener)
    room = room_of(settings)
    admission = Admission(room.shortage)
    runs = Runs(
        store,
        clock,
        notices,
        workflows=workflows,
        gates=gates,
        reports=reports,
        layers=RunFiles(workspaces, artifacts),
        forks=RunForks(
            store, clock, workflows, files=WorkspaceForks(settings.workspaces_path, workspaces), codes=code
        ),
        run_timeout=settings.run_timeout,
        admission=admission,
    )
    collector = Collector(
        stores_of(
            settings,
            clock,
            runs=runs,
            source=source,
            workspaces=workspaces,
            logs=logs,
            caches=caches,
            artifacts=artifacts,
            maker=maker,
            pinned=images,
            store=store,
            remote_of=remotes,
        ),
        clock,
    )
    room_keeper = RoomKeeper(collector, room, clock, runs.let_go)
    admission.on_refusal = room_keeper.wake
    deliveries = Deliveries(
        store, clock, forges=forges, runs=runs, commits=code, allow_forks=settings.allow_forks
    )
    pushes = Pushes(store, deliveries, source)
    git_store = GitStore(repositories, source, imports, pushes, access)

    await _recover(source, execution, workspaces, logs, runs, pushes, git_store)
    await caches.sweep()
    await artifacts.sweep()
    try:
        async with isolation.opened(loader, settings), engine:
            try:
                yield Platform(
                    settings=settings,
                    clock=clock,
                    store=store,
                    access=access,
                    repositories=repositories,
                    imports=imports,
                    refresher=Refresher(
                        store,
                        clock,
                        imports=imports,
                        source=source,
                        pushes=pushes,
                        protocols=source.protocols,
                    ),
                    git_store=git_store,
                    deliveries=deliveries,
                    pushes=pushes,
                    runs=runs,
                    gates=gates,
                    reports=reports,
                    logs=logs,
                    source=source,
                    workspaces=workspaces,
                    caches=caches,
                    artifacts=artifacts,
                    execution=execution,
                    collector=collector,
                    room_keeper=room_keeper,
                    sandboxes=sandboxes,
                    releases=releases,
                    engine=engine,
                    instances=workflows,
                    forges=forges,
                )
            finally:
                # Before the engine ends what runs: commands go on, for the next process to find.
                execution.leave()
    finally:
        for close in (*(sandbox.close for sandbox in sandboxes.values()), source.close):
            await close()


async def _recover(
    source: Source,
    execution: Execution,
    workspaces: Workspaces,
    logs: Logs,
    runs: Runs,
    pushes: Pushes,
    git_store: GitStore,
) -> None:
    """Take away what a killed process left, before anything new starts."""
    touched = await source.sweep()
    await execution.recover(await runs.open_ids())
    await workspaces.sweep(await runs.kept_ids())
    await anyio.to_thread.run_sync(logs.sweep)
    await pushes.reconcile(touched)
    await source.reconciled()
    await git_store.sweep()


def _housekeeping(platform: Platform) -> Retention:
    """Return what forgets old runs and keeps the data folder within its budgets."""

    async def tidy() -> None:
        await platform.collector.collect()
        await platform.caches.tidy()
        await platform.source.maintain()

    return Retention(
        platform.runs,
        platform.instances,
        platform.clock,
        keep=platform.settings.retention,
        files=[platform.workspaces.delete_run, platform.artifacts.delete_run],
        tidy=tidy,
    )


def make_loader(settings: Settings) -> ProcessLoader:
    """Return what runs pipeline code; `isolation.opened` opens it."""
    return ProcessLoader(allow_unconfined=settings.unsafe_no_isolation)


def make_sandboxes(settings: Settings) -> dict[SandboxKind, Sandbox]:
    """Return what runs commands, by the name a pipeline chooses it by."""
    sandboxes: dict[SandboxKind, Sandbox] = {
        "isolate": IsolateSandbox(
            allow_network=settings.allow_network,
            inner_hosts=settings.inner_hosts or (),
            kept=settings.command_kept,
        )
    }
    if settings.allow_containers:
        network = "bridge" if settings.allow_network else None
        sandboxes["container"] = ContainerSandbox(
            image=settings.container_image,
            named=read_names(settings.images_file),
            pull=settings.pull_images,
            network=network,
            home=hashlib.sha256(str(settings.data).encode()).hexdigest()[:12],
        )
    return sandboxes


def make_forges(settings: Settings, clock: Clock, store: Store) -> dict[str, Forge]:
    """Return the forges by name."""
    token, secret = settings.github_token, settings.github_webhook_secret
    github = GitHubForge(
        api_url=settings.github_api_url,
        url=settings.github_url,
        token=token.get_secret_value() if token else None,
        webhook_secret=secret.get_secret_value() if secret else None,
        timeout=settings.github_timeout,
    )
    return {
        "github": github,
        "local": LocalForge(store, clock, lambda repo: f"{settings.base_url}/git/{repo}.git"),
    }

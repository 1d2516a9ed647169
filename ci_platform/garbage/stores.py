"""Which stores a platform has, each with its allowance from the settings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta

from ci_platform.artifacts import Artifacts
from ci_platform.caches import Caches
from ci_platform.fetching import Remote
from ci_platform.garbage import Allowance, Collectable
from ci_platform.garbage.artifacts import KeptArtifacts
from ci_platform.garbage.caches import CacheEntries
from ci_platform.garbage.images import MadeImages
from ci_platform.garbage.lfs import LfsFiles
from ci_platform.garbage.logs import RunLogs
from ci_platform.garbage.mirrors import Mirrors
from ci_platform.garbage.own_lfs import PushedLfsFiles
from ci_platform.garbage.room import Room
from ci_platform.garbage.trees import Trees
from ci_platform.garbage.wanted import Wanted, wanted_by, without_lfs_layer
from ci_platform.garbage.workspaces import EndedRuns, Failures
from ci_platform.images import PinnedImages
from ci_platform.logs import Logs
from ci_platform.run_queries import RunQueries
from ci_platform.sandboxes import ImageMaker, Sandbox
from ci_platform.settings import Settings
from ci_platform.source import Source
from ci_platform.store import Store
from ci_platform.workspaces import Workspaces
from dynflow.clock import Clock


def stores_of(  # noqa: PLR0913 - the parts of a platform that hold something
    settings: Settings,
    clock: Clock,
    *,
    runs: RunQueries,
    source: Source,
    workspaces: Workspaces,
    logs: Logs,
    caches: Caches,
    artifacts: Artifacts,
    maker: Sandbox | None,
    pinned: PinnedImages,
    store: Store,
    remote_of: Callable[[str], Awaitable[Remote | None]],
) -> list[Collectable]:
    """Return what can be collected of a data folder."""

    async def wanted() -> Wanted:
        return await wanted_by(workspaces, runs.open_ids)

    async def mirrors() -> set[str]:
        return (await wanted()).mirrors.union((await runs.repos(still_open=True)).values())

    async def lfs() -> set[str]:
        return await without_lfs_layer(source, await wanted())

    images = []
    if isinstance(maker, ImageMaker):
        allowance = _allowance(settings, settings.image_budget)
        images.append(MadeImages(maker, pinned, store, allowance, still_open=runs.open_ids))
    return [
        *images,
        Mirrors(source, _allowance(settings, settings.mirror_budget), wanted=mirrors, remote_of=remote_of),
        LfsFiles(source.lfs, _allowance(settings, settings.lfs_budget), wanted=lfs),
        PushedLfsFiles(source, _allowance(settings, settings.lfs_budget), wanted=wanted),
        Trees(
            source,
            _allowance(settings, settings.tree_cache, newest=1),
            in_use=workspaces.in_use,
            wanted=wanted,
        ),
        EndedRuns(
            workspaces,
            _allowance(settings, settings.workspace_budget, newest=1),
            still_open=runs.open_ids,
        ),
        Failures(workspaces, _allowance(settings, settings.failure_budget), kept_for=settings.keep_failures),
        CacheEntries(
            caches,
            Allowance(settings.cache_disk, settings.keep_recent, of_repository=settings.cache_floor),
        ),
        *_artifacts(settings, clock, artifacts, store, runs),
        RunLogs(
            logs,
            _allowance(settings, settings.log_budget, newest=1),
            clock,
            kept_for=settings.retention,
            still_open=runs.open_ids,
            repos=runs.repos,
        ),
    ]


def _artifacts(
    settings: Settings, clock: Clock, artifacts: Artifacts, store: Store, runs: RunQueries
) -> list[Collectable]:
    """Return artifacts as two stores: what forks' pull requests upload takes no room from the others."""
    budget, recent = settings.artifact_budget, settings.keep_recent
    own, outside = (
        Allowance(budget, recent, of_repository=settings.artifact_floor),
        Allowance(budget // 4, recent),
    )
    return [
        KeptArtifacts(artifacts, store, clock, own, still_open=runs.open_ids),
        KeptArtifacts(artifacts, store, clock, outside, still_open=runs.open_ids, outside=True),
    ]


def _allowance(settings: Settings, budget: int, newest: int = 0) -> Allowance:
    newest_for = settings.keep_newest if newest else timedelta()
    return Allowance(budget, settings.keep_recent, newest, newest_for)


def room_of(settings: Settings) -> Room:
    """Return the room of the file systems that a platform writes to; Docker's own is not among them."""
    folders = [
        settings.data,
        settings.data / "source",
        settings.artifacts_path,
        settings.workspaces_path,
        settings.logs_path,
    ]
    return Room(folders, min_free=settings.min_free, min_files=settings.min_free_files)

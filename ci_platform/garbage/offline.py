"""The garbage of a data folder that no server holds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

from ci_platform import data_lock
from ci_platform.artifacts import Artifacts
from ci_platform.assembly import make_forges, make_sandboxes
from ci_platform.caches import Caches
from ci_platform.copy_on_write import Method
from ci_platform.errors import InvalidInputError
from ci_platform.garbage.collector import Collector
from ci_platform.garbage.operating import Garbage, collect_now
from ci_platform.garbage.stores import room_of, stores_of
from ci_platform.images import PinnedImages
from ci_platform.imports import Imports
from ci_platform.logs import Logs
from ci_platform.looking import looked_at
from ci_platform.open_trees import OpenTree
from ci_platform.remotes import Remotes
from ci_platform.repositories import Repositories
from ci_platform.run_queries import RunQueries
from ci_platform.settings import Settings
from ci_platform.source import Source
from ci_platform.store import Store
from ci_platform.survival import Survival
from ci_platform.workspaces import Workspaces
from dynflow.clock import SystemClock

_METHOD = Method("copy", {})
"""Nothing is mounted and nothing copied: no command runs."""


async def collect_offline(settings: Settings, *, dry_run: bool) -> Garbage:
    """Collect the garbage of a data folder, see `collect_now`. ConflictError while a server holds it."""
    if not settings.data.is_dir() or not settings.workspaces_path.is_dir():
        raise InvalidInputError(
            f"there is no platform in {settings.data}: --data names the folder of a platform"
        )
    with data_lock.held(settings.data, look_only=dry_run):
        async with _opened(settings, look_only=dry_run) as collector:
            return await collect_now(collector, room_of(settings), dry_run=dry_run)


@asynccontextmanager
async def _store(settings: Settings) -> AsyncIterator[Store]:
    store = Store(settings.store_url)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def _opened(settings: Settings, *, look_only: bool) -> AsyncIterator[Collector]:
    clock, maker = SystemClock(), make_sandboxes(settings).get("container")
    database = looked_at(settings.store_url) if look_only else _store(settings)
    async with AsyncExitStack() as opened, database as store:
        if maker is not None:
            opened.push_async_callback(maker.close)
        forges = make_forges(settings, clock, store)
        repositories = Repositories(store, forges, clock)
        imports = Imports.of(settings, store, clock, repositories)
        remotes = Remotes(repositories, imports, forges)
        source = Source(
            settings.data / "source",
            allow_file=settings.allow_file_remotes,
            remote_of=remotes,
            look_only=look_only,
        )
        workspaces = _Workspaces(settings, source, look_only=look_only)
        caches = Caches.of(settings, _METHOD, store, clock)
        for each in workspaces.left:
            if (left := OpenTree.from_plain(each)) is not None:
                caches.reopen(each.get("caches"), left.tree)
        await (caches.look() if look_only else caches.sweep())
        artifacts = Artifacts.of(settings, store, clock, workspaces)
        if not look_only:
            await artifacts.sweep()
        stores = stores_of(
            settings,
            clock,
            # No engine is asked: who has not ended is in the database.
            runs=RunQueries(store, clock, cast("Any", None)),
            source=source,
            workspaces=workspaces,
            logs=Logs(settings.logs_path, clock=clock),
            caches=caches,
            artifacts=artifacts,
            maker=maker,
            pinned=PinnedImages(store, clock),
            store=store,
            remote_of=remotes,
        )
        yield Collector(stores, clock)


class _Workspaces(Workspaces):
    """The workspaces of a data folder, on which commands may stand that the last server has left running."""

    def __init__(self, settings: Settings, source: Source, *, look_only: bool) -> None:
        super().__init__(settings.workspaces_path, source, _METHOD, look_only=look_only)
        self.left = Survival(settings.data / "commands").trees()

    def in_use(self) -> set[Path]:
        """Return the trees that these commands stand on."""
        return super().in_use() | {Path(lower) for each in self.left for lower in each["lowers"]}

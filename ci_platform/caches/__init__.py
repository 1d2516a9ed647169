"""Caches: files that commands find again in later runs, mounted copy-on-write beside the workspace.

`specs` what a pipeline may ask for · `keys` keys that follow from files · `scopes` whose caches a run may use ·
`entries` what is on disk · `opened` what a command works on · `eviction` what goes · `records` what runs are told.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from ci_platform import full_disk, layers
from ci_platform.caches.entries import CacheEntry, Entries, entry_id
from ci_platform.caches.eviction import Budget, has_room, victims
from ci_platform.caches.keys import KeyMaker
from ci_platform.caches.opened import OpenCache, OpenCaches
from ci_platform.caches.records import CacheRecords
from ci_platform.caches.scopes import RunScopes, Scope
from ci_platform.caches.specs import Wanted, checked
from ci_platform.copy_on_write import Method
from ci_platform.errors import PlatformError, UnavailableError
from ci_platform.sandboxes import MEBIBYTE, SANDBOX_UID, Mount, Say, Tree
from ci_platform.settings import Settings
from ci_platform.stacks import LayerAuthor
from ci_platform.store import Store
from ci_platform.trees import Owner
from dynflow.clock import Clock
from pipelines.contract import CacheSpec

__all__ = ["Budget", "CacheEntry", "Caches"]

_FINDING, _SAVING = 4, 2
"""Threads. Saving may take long, for a command may leave a million files; others must find theirs meanwhile."""

T = TypeVar("T")


class Caches:
    """All caches of a platform.

    *Order of calls*: `sweep` once at start, after `reopen` of what commands of an earlier process use; then for each
    command `open`, `save` if it has succeeded, `close`. *Concurrency*: one event loop, one process. *Idempotency*: of
    two that save one key the first wins; `close` and `delete`. *Cancellation*: a call in progress ends its work on disk
    first. *Errors*: CacheInvalidError and LimitExceededError from `open` are the tenant's; `save` has
    none: what cannot be saved is said.

    `root` is on the file system of the workspaces, whose `method` it uses.
    """

    def __init__(
        self,
        root: Path,
        method: Method,
        store: Store,
        clock: Clock,
        *,
        budget: Budget | None = None,
        durable: bool = True,
    ) -> None:
        self._entries, self._method, self._durable = Entries(root, durable), method, durable
        self._scopes, self._records, self._clock = RunScopes(store), CacheRecords(store, clock), clock
        self._budget = budget or Budget()
        self._owner = Owner.of_sandboxes(SANDBOX_UID)
        self._finding, self._saving = anyio.CapacityLimiter(_FINDING), anyio.CapacityLimiter(_SAVING)
        self._open: dict[Path, OpenCaches] = {}

    @classmethod
    def of(cls, settings: Settings, method: Method, store: Store, clock: Clock) -> Caches:
        """Return the caches of a data folder, with the budget that is set."""
        budget = Budget(settings.cache_disk, settings.cache_repository, settings.cache_floor)
        return cls(settings.caches_path, method, store, clock, budget=budget)

    async def _thread(self, function: Callable[[], T], *, long: bool = False) -> T:
        with anyio.CancelScope(shield=True):
            limiter = self._saving if long else self._finding
            result = await anyio.to_thread.run_sync(full_disk.told(function), limiter=limiter)
        return result  # noqa: RET504 - for all that mypy knows, a scope swallows errors

    # --- for the platform ------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Find the entries, and remove what a killed process left half done."""
        spared = {opened.folder for opened in self._open.values()}
        await self._thread(lambda: self._entries.load(spared))

    async def look(self) -> None:
        """Find the entries, and change nothing."""
        await self._thread(self._entries.find)

    def entries(self) -> list[CacheEntry]:
        """Return every entry with its size, last use, and whether a command uses it now."""
        return self._entries.all()

    async def delete(self, identity: str) -> bool:
        """Delete an entry; False where there is none (any more) or a command uses it."""
        return await self._evict([identity]) == 1

    async def tidy(self) -> int:
        """Delete what repositories have left that are gone, and what is over the budget; returns the bytes."""
        tenants, before = await self._scopes.tenants(), self._entries.all()
        await self._evict([each.id for each in before if each.tenant not in tenants])
        await self._evict([each.id for each in victims(self._entries.all(), self._budget)])
        left = {each.id for each in self._entries.all()}
        return sum(each.size for each in before if each.id not in left)

    async def _evict(self, identities: Collection[str]) -> int:
        now = self._clock.now()
        trash = [path for each in identities if (path := self._entries.discard(each, now)) is not None]
        await self._thread(lambda: _remove(trash), long=True)
        return len(trash)

    # --- for a command ---------------------------------------------------------------------------

    async def open(
        self, run_id: str, author: LayerAuthor, specs: tuple[CacheSpec, ...], tree: Tree, say: Say
    ) -> tuple[Tree, tuple[Mount, ...]]:
        """Find what a command asks for; returns its tree with room for the mounts, and the mounts.

        `say` hears of each cache whether it was found, and why not.
        """
        wanted = checked(specs)
        if not wanted:
            return tree, ()
        scope = await self._scopes.of(run_id)
        asked = await self._thread(lambda: _with_keys(wanted, tree))
        opened = OpenCaches(run_id, await self._thread(self._entries.scratch))
        self._open[tree.upper] = opened
        try:
            opened.caches = tuple(
                self._find(scope, each, opened.folder / str(number)) for number, each in enumerate(asked)
            )
            tree = await self._thread(lambda: self._prepare(opened, asked, tree))
            opened.caches = tuple(
                [
                    await self._tell(run_id, author, scope, *each, say)
                    for each in zip(opened.caches, asked, strict=True)
                ]
            )
        except BaseException as error:
            await self.close(tree)
            if isinstance(error, OSError):
                raise UnavailableError(f"the caches of a command cannot be prepared: {error}") from error
            raise
        return tree, opened.mounts()

    def _find(self, scope: Scope, asked: Wanted, folder: Path) -> OpenCache:
        paths = tuple(map(str, asked.places))
        found = self._exact(scope, asked.key, paths)
        exact = found is not None
        found = found or self._by_prefix(scope, asked, paths)
        if found is None:
            return OpenCache(asked.key, paths, "miss", folder)
        self._entries.pin(found.id)
        self._entries.touch(found, self._clock.now())
        files = self._entries.folder(found) / "files"
        return OpenCache(asked.key, paths, "hit" if exact else "restored", folder, found.id, files)

    def _exact(self, scope: Scope, key: str, paths: tuple[str, ...]) -> CacheEntry | None:
        identities = (entry_id(scope.tenant, each, key, paths) for each in scope.readable)
        return next((found for each in identities if (found := self._entries.get(each))), None)

    def _by_prefix(self, scope: Scope, asked: Wanted, paths: tuple[str, ...]) -> CacheEntry | None:
        return next(
            (
                entry
                for prefix in asked.restore_keys
                for each in scope.readable
                for entry in self._entries.of(scope.tenant, each, paths)
                if entry.key.startswith(prefix)
            ),
            None,
        )

    def _prepare(self, opened: OpenCaches, asked: tuple[Wanted, ...], tree: Tree) -> Tree:
        for each in opened.caches:
            each.prepare(self._method, self._owner)
        return opened.make_ways(tree, [place for each in asked for place in each.places])

    async def _tell(
        self, run_id: str, author: LayerAuthor, scope: Scope, cache: OpenCache, asked: Wanted, say: Say
    ) -> OpenCache:
        reason = self._reason(scope, cache, asked)
        say(f"cache: {reason}")
        return replace(cache, record=await self._records.add(run_id, author, cache, reason))

    def _reason(self, scope: Scope, cache: OpenCache, asked: Wanted) -> str:
        entry = None if cache.entry is None else self._entries.get(cache.entry)
        if entry is not None:
            what = f"{entry.key!r} of {entry.scope}, {_amount(entry.size, entry.files)}"
            return (
                f"hit: {what}"
                if cache.outcome == "hit"
                else f"restored {what}, for {cache.key!r} is not there"
            )
        reason = f"miss: there is no {cache.key!r}"
        if asked.restore_keys:
            reason += f", and none that begins with {' or '.join(map(repr, asked.restore_keys))},"
        reason += f" of {' or '.join(scope.readable)}"
        if self._entries.has_other_paths(scope.tenant, scope.readable, cache.key):
            reason += "; what has this key holds other paths"
        evicted = [
            self._entries.evicted_at(entry_id(scope.tenant, each, cache.key, cache.paths))
            for each in scope.readable
        ]
        if when := next((each for each in evicted if each), None):
            reason += f"; it was evicted at {when:%Y-%m-%d %H:%M} UTC"
        return reason

    async def save(self, tree: Tree, say: Say) -> None:
        """Make entries of what a command that has succeeded leaves, where their keys were not there."""
        opened = self._open.get(tree.upper)
        if opened is None:
            return
        await self._thread(lambda: opened.remove_ways(tree.upper))
        for cache in opened.caches:
            if cache.outcome != "hit":
                try:
                    told = await self._save(await self._scopes.of(opened.run_id), cache)
                except (OSError, PlatformError) as error:
                    told = f"not saved: {error}"
                say(f"cache: {told}")
                await self._records.saved(cache, told)

    async def _save(self, scope: Scope, cache: OpenCache) -> str:
        now, identity = self._clock.now(), entry_id(scope.tenant, scope.own, cache.key, cache.paths)
        lost = f"not saved: another command has saved {cache.key!r} first"
        if self._entries.get(identity) is not None:
            return lost
        scratch = cache.folder / "entry"
        size, files = await self._thread(lambda: self._collect(cache, scratch), long=True)
        if not files:
            return f"not saved: there is nothing in {', '.join(cache.paths)}"
        if size > self._budget.repository:
            most = _amount(self._budget.repository)
            return f"not saved: {_amount(size, files)} are more than a repository may have ({most}, cache_repository)"
        entry = CacheEntry(
            identity,
            scope.repo,
            scope.tenant,
            scope.own,
            cache.key,
            cache.paths,
            size,
            files,
            now,
            now,
            scope.outside,
        )
        if not await self._thread(lambda: self._entries.publish(scratch, entry), long=True):
            return lost
        self._entries.add(entry)
        if not await self._make_room(entry):
            return f"not saved: there is no room for {_amount(size, files)} (cache_disk, cache_repository)"
        return f"saved {cache.key!r} of {scope.own}, {_amount(size, files)}"

    def _collect(self, cache: OpenCache, scratch: Path) -> tuple[int, int]:
        scratch.mkdir()
        return cache.collect(scratch, self._owner, durable=self._durable)

    async def _make_room(self, entry: CacheEntry) -> bool:
        """Evict others for a new entry, or the entry itself where that is not enough."""
        gone = victims(self._entries.all(), self._budget, spared=entry.id, outside_only=entry.outside)
        await self._evict([each.id for each in gone])
        if has_room(self._entries.all(), self._budget, entry.tenant):
            return True
        await self._evict([entry.id])
        return False

    async def close(self, tree: Tree) -> None:
        """Let go of what a command used. Nothing may use it any more; nothing where it used nothing."""
        opened = self._open.pop(tree.upper, None)
        if opened is None:
            return
        for cache in opened.caches:
            if cache.entry is not None:
                self._entries.unpin(cache.entry)
        await self._thread(lambda: layers.remove_tree(opened.folder), long=True)

    # --- for commands that outlive the platform -------------------------------------------------

    def describe(self, tree: Tree) -> dict[str, Any] | None:
        """Return what a later process needs to `reopen` the caches of a tree; None where it has none."""
        opened = self._open.get(tree.upper)
        return None if opened is None else opened.as_plain()

    def reopen(self, told: Mapping[str, Any] | None, tree: Tree) -> None:
        """Hold the caches that a command of an earlier process uses; call before `sweep`."""
        if told is None:
            return
        opened = OpenCaches.from_plain(told)
        self._open[tree.upper] = opened
        for cache in opened.caches:
            if cache.entry is not None:
                self._entries.pin(cache.entry)


def _with_keys(wanted: tuple[Wanted, ...], tree: Tree) -> tuple[Wanted, ...]:
    """Return the same with the keys that follow from the workspace as it stands."""
    make = KeyMaker(tree.lowers or (tree.upper,))
    return tuple(
        replace(each, key=make(each.key), restore_keys=tuple(map(make, each.restore_keys))) for each in wanted
    )


def _remove(paths: Collection[Path]) -> None:
    for path in paths:
        layers.remove_tree(path)


def _amount(size: int, files: int | None = None) -> str:
    shown = f"{size / MEBIBYTE:,.1f} MiB"
    return shown if files is None else f"{files:,} files, {shown}"

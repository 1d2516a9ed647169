"""What a fork may have on top of its commit's own tree: files of submodules, and files that LFS keeps."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ci_platform import submodules, workspace_git
from ci_platform.errors import (
    FailedError,
    ForbiddenError,
    LimitExceededError,
    MissingObjectError,
    NotFoundError,
    PlatformError,
    UnavailableError,
)
from ci_platform.guarded import Guard, WayAsNeeded
from ci_platform.lfs_fetching import LfsFetching
from ci_platform.module_access import ModuleAccess, Place
from ci_platform.named_locks import NamedLocks
from ci_platform.origins import Origin
from ci_platform.remotes import Remotes
from ci_platform.repositories import Repositories
from ci_platform.settings import Settings
from ci_platform.source import Checkout, GitFolder, Remote, Source
from ci_platform.submodules import Declared, Module

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", re.ASCII)
_MOST_PARSED = 200
"""Files whose submodules are remembered."""

_CLOSED = re.compile(r"Authentication failed|could not read (?:Username|Password)|returned error: 40[13]")
"""What git says where it would need credentials."""


@dataclass(frozen=True, slots=True)
class _Level:
    """A commit whose submodules are looked for: the workspace's own, or that of a submodule."""

    store: str
    sha: str
    base: str
    path: str = ""
    folder: str = ""
    depth: int = 0


class Grafts:
    """Finds, fetches and writes what goes onto a commit."""

    def __init__(self, source: Source, access: ModuleAccess, guard: Guard, lfs: LfsFetching) -> None:
        self._source, self._access, self._guard, self._lfs = source, access, guard, lfs
        self._parsed: dict[bytes, list[Declared]] = {}
        self._mending = NamedLocks()

    async def find(self, origin: Origin) -> Origin:
        """Return the origin with the submodules that its commit has, those of submodules included, fetched.

        Raises FailedError, ForbiddenError, UnavailableError that name the submodule.
        """
        if not origin.submodules:
            return origin
        async with self._guard.as_needed(trusted=not origin.alone) as way:
            return replace(origin, modules=tuple(await self._all_inside(origin, way)))

    async def _all_inside(self, origin: Origin, way: WayAsNeeded) -> list[Module]:
        found = list[Module]()
        levels = [_Level(origin.repo, origin.sha, await self._access.home(origin.repo))]
        while levels:
            level = levels.pop(0)
            for module in await self._inside(origin, level, way):
                found.append(module)
                if len(found) > submodules.MOST:
                    raise LimitExceededError(f"{origin} has more than {submodules.MOST} submodules")
                levels.append(
                    _Level(module.store, module.sha, module.url, module.path, module.folder, level.depth + 1)
                )
        return found

    async def _inside(self, origin: Origin, level: _Level, way: WayAsNeeded) -> list[Module]:
        content = await self._source.read_file(
            level.store, level.sha, submodules.FILE, limit=submodules.LARGEST
        )
        if content is None:
            return []
        declared = await self._parse(content)
        if level.depth == 0 and origin.cone is not None:
            declared = [each for each in declared if origin.cone.holds(each.path.encode())]
        links = await self._source.links(level.store, level.sha, [each.path for each in declared])
        wanted = [each for each in declared if each.path in links]
        if wanted and level.depth == submodules.DEEPEST:
            raise LimitExceededError(
                f"submodules are inside of each other {submodules.DEEPEST} deep, and {level.path!r} has more"
            )
        return [await self._module(origin, level, each, links[each.path], way) for each in wanted]

    async def _parse(self, content: bytes) -> list[Declared]:
        """Read a file as `submodules.parse` does; the same content again costs no process."""
        digest = hashlib.sha256(content).digest()
        if digest not in self._parsed:
            if len(self._parsed) >= _MOST_PARSED:
                self._parsed.clear()
            self._parsed[digest] = await submodules.parse(content)
        return self._parsed[digest]

    async def _module(
        self, origin: Origin, level: _Level, declared: Declared, sha: str, way: WayAsNeeded
    ) -> Module:
        url = submodules.resolve(declared, level.base)
        try:
            place = await self._access.place(origin.repo, url, trusted=not origin.alone)
        except ForbiddenError as error:
            raise ForbiddenError(f"the submodule at {declared.path!r}: {error}") from None
        module = Module(
            name=declared.name,
            path=f"{level.path}/{declared.path}".lstrip("/"),
            folder=f"{level.folder}/modules/{_folder(declared.name)}".lstrip("/"),
            above=level.path,
            url=url,
            store=place.store,
            sha=sha,
            registered=place.registered,
        )
        await self._obtain(origin.repo, module, place, way)
        return module

    async def _obtain(self, repo: str, module: Module, place: Place, way: WayAsNeeded) -> None:
        """Have the commit here. What goes wrong is told with the submodule's path and address."""
        if place.registered and place.remote is None and not await self._source.has(module.store, module.sha):
            raise FailedError(_said(module, "it has no such commit"))
        try:
            if place.remote is not None and not place.registered:
                await self._fetch_as_anybody(repo, module, way)
            elif place.remote is not None:
                await self._source.fetch(module.store, module.sha, place.remote)
                await self._source.complete(module.store, module.sha)
        except (FailedError, UnavailableError) as error:
            raise type(error)(_said(module, str(error).replace(repr(module.store), "it"))) from None

    async def _fetch_as_anybody(self, repo: str, module: Module, way: WayAsNeeded) -> None:
        if await self._source.has(module.store, module.sha):
            return
        out = await way()
        try:
            await self._source.fetch(module.store, module.sha, Remote(module.url, proxy=out.proxy))
        except PlatformError as error:
            if refused := await out.refusals():
                raise ForbiddenError(_said(module, "; ".join(refused))) from None
            if await out.is_spent():
                raise LimitExceededError(_too_much(self._guard.most)) from None
            if _CLOSED.search(str(error)):
                raise FailedError(_leave(repo)) from None
            raise

    async def onto(self, checkout: Checkout, origin: Origin, folder: GitFolder) -> Checkout:
        """Return the checkout with the layers that the origin wants on top of it."""
        config, lowers = folder.config() + (workspace_git.LINKED if origin.lfs else ""), checkout.lowers
        if origin.lfs:
            lowers = (await self._files(origin, folder, config), *lowers)
        if not origin.modules:
            return replace(checkout, lowers=lowers)
        modules = await self._modules(origin, folder, config)
        return replace(checkout, lowers=(modules, *lowers), modules=modules.parent.name)

    async def _files(self, origin: Origin, folder: GitFolder, config: str) -> Path:
        found = await self._source.lfs_layer(origin.repo, folder, config)
        if found is None:
            files = await self._source.pointed(origin.repo, origin.sha, origin.cone)
            await self._lfs.obtain(origin.repo, origin.sha, files, trusted=not origin.alone)
            found = await self._source.lfs_layer(origin.repo, folder, config, files)
        assert found is not None  # noqa: S101 - with files it is made
        return found

    async def _modules(self, origin: Origin, folder: GitFolder, config: str) -> Path:
        async def layer() -> Path:
            return await self._source.module_layer(origin.repo, origin.modules, folder, config, origin.layer)

        with suppress(MissingObjectError, NotFoundError):
            return await layer()
        # One at a time: each takes away what it cannot read, which another one may have fetched just now.
        async with self._mending(origin.repo):
            with suppress(MissingObjectError, NotFoundError):
                return await layer()
            async with self._guard.as_needed(trusted=not origin.alone) as way:
                for module in origin.modules:
                    await self._again(origin, module, way)
            return await layer()

    async def _again(self, origin: Origin, module: Module, way: WayAsNeeded) -> None:
        """Fetch anew what is damaged, or was taken away."""
        place = await self._access.place(origin.repo, module.url, trusted=not origin.alone)
        if not place.registered:
            await self._source.delete(place.store)
        await self._obtain(origin.repo, module, place, way)


def _folder(name: str) -> str:
    """Return the folder of a submodule's `.git`: its name, unless that could be taken for more than one."""
    return name if _PLAIN_NAME.fullmatch(name) else f"~{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _leave(repo: str) -> str:
    return (
        "nobody reads it without credentials. If it is registered here, an administrator lets "
        f"{repo} read it: dynflow repo set {repo} --reads OWNER/NAME"
    )


def _too_much(most: int) -> str:
    return (
        f"all submodules may bring {most:,} bytes together from hosts that a commit names (setting max_fetch)"
    )


def _said(module: Module, what: str) -> str:
    return f"the submodule at {module.path!r} ({module.url} at {module.sha}): {what}"


def make_grafts(settings: Settings, source: Source, repositories: Repositories, remotes: Remotes) -> Grafts:
    """Return what the settings allow."""
    guard = Guard(settings.inner_hosts or (), allowed=settings.allow_network, most=settings.max_fetch)
    access = ModuleAccess(repositories, remotes, settings.base_url)
    return Grafts(source, access, guard, LfsFetching(source, remotes, guard, most=settings.max_lfs))

"""Workspaces of runs that have ended, and what failed commands left in any: nobody can make these again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio.to_thread

from ci_platform.errors import NotFoundError
from ci_platform.garbage import Allowance, Item
from ci_platform.layer_pool import Part
from ci_platform.origins import Origin
from ci_platform.stacks import Layer, Stack
from ci_platform.workspaces import Workspaces

_ALONE = 2
"""Links of a layer that one workspace has: its own, and the pool's."""

OpenRuns = Callable[[], Awaitable[Collection[str]]]
"""Asks which runs have not ended."""


class EndedRuns:
    """The layers and snapshots of runs, a run's workspaces together: one without the others is of no use."""

    kind = "workspaces"

    def __init__(self, workspaces: Workspaces, allowance: Allowance, *, still_open: OpenRuns) -> None:
        self.allowance = allowance
        self._workspaces, self._still_open = workspaces, still_open

    async def items(self) -> Sequence[Item]:
        """Return the runs whose workspaces are on disk."""
        still_open = await self._still_open()
        return await anyio.to_thread.run_sync(_runs, stacks(self._workspaces.root), still_open)

    async def collect(self, name: str) -> bool:
        """Delete a run's workspaces; a rerun from one of its steps is then refused, one from the start is not."""
        async with self._workspaces.settled(name):
            if name in await self._still_open():
                return False
            return all([await self._workspaces.collect(each) for each in await self._workspaces.of_run(name)])


class Failures:
    """What failed commands left, to be looked at for a while (`kept_for`)."""

    kind = "failures"

    def __init__(self, workspaces: Workspaces, allowance: Allowance, *, kept_for: timedelta) -> None:
        self.allowance = allowance
        self._workspaces, self._kept_for = workspaces, kept_for

    async def items(self) -> Sequence[Item]:
        """Return what is kept of failed commands."""
        in_use = self._workspaces.in_use()
        return await anyio.to_thread.run_sync(
            lambda: [item for stack in stacks(self._workspaces.root) for item in self._of(stack, in_use)]
        )

    def _of(self, stack: Stack, in_use: set[Path]) -> Iterable[Item]:
        origin = origin_of(stack)
        try:
            kept = stack.kept() if origin is not None else []
        except FileNotFoundError:
            return  # one of them is being removed
        for layer in kept:
            taken = _Taken() if _is_shared(layer) else _taken(layer.parts[0])
            used_at = datetime.fromtimestamp(int(layer.place.name) / 1e9, UTC)
            yield Item(
                f"{stack.folder.name}/{layer.place.name}",
                None if origin is None else origin.repo,
                taken.size,
                used_at,
                taken.files,
                "a reader stands on it" if in_use.intersection(layer.trees) else None,
                used_at + self._kept_for,
            )

    async def collect(self, name: str) -> bool:
        """Delete one, unless somebody looks at it."""
        workspace_id, _, folder = name.partition("/")
        return await self._workspaces.remove_failure(workspace_id, folder)


@dataclass(frozen=True, slots=True)
class _Taken:
    """What is written down of a layer, since looking at millions of files takes minutes."""

    size: int = 0
    files: int = 0


def _taken(part: Part) -> _Taken:
    return _Taken(part.record.get("size") or 0, (part.record.get("paths") or 0) + 4)


def _is_shared(layer: Layer) -> bool:
    """Whether a fork has what is kept as well: it is counted there."""
    try:
        return not layer.place.is_dir() and layer.place.stat().st_nlink > _ALONE
    except FileNotFoundError:
        return False


def stacks(root: Path) -> list[Stack]:
    """Return all workspaces on disk."""
    return [Stack(path) for path in root.glob("[!.]*")]


def origin_of(stack: Stack) -> Origin | None:
    """Return what a workspace was forked from, None where it is gone or collected."""
    try:
        return Origin.from_json(stack.describe())
    except NotFoundError:
        return None


@dataclass(slots=True)
class _Run:
    """The workspaces of a run: `parts` are the files of their layers."""

    item: Item
    parts: dict[Path, _Taken] = field(default_factory=dict)

    @property
    def staying(self) -> tuple[bool, datetime, str]:
        """What goes last is largest."""
        return self.item.pinned is not None, self.item.used_at, self.item.name


def _runs(found_stacks: Sequence[Stack], still_open: Collection[str]) -> list[Item]:
    found = dict[str, _Run]()
    for stack in found_stacks:
        run_id = stack.folder.name.partition(".")[0]
        pinned = "the run has not ended" if run_id in still_open else None
        seen = _look(stack)
        if seen is None:
            continue
        origin, parts, used_at = seen
        run = found.setdefault(run_id, _Run(Item(run_id, origin.repo, 0, used_at, 0, pinned)))
        run.item = replace(run.item, files=run.item.files + 4, used_at=max(run.item.used_at, used_at))
        run.parts |= parts
    return _counted_once(found.values())


def _look(stack: Stack) -> tuple[Origin, dict[Path, _Taken], datetime] | None:
    """Return what a workspace is of, has, and when it was used; None where somebody takes it away just now."""
    origin = origin_of(stack)
    if origin is None:
        return None
    try:
        parts = {part.tree: _taken(part) for layer in stack.layers() for part in layer.parts}
        used_at = (stack.folder / "layers").stat().st_mtime
    except FileNotFoundError:
        return None
    return origin, parts, datetime.fromtimestamp(used_at, UTC)


def _counted_once(runs: Iterable[_Run]) -> list[Item]:
    """Count a layer that several runs have for the one that goes last: with the others it does not go."""
    counted, items = set[Path](), list[Item]()
    for run in sorted(runs, key=lambda each: each.staying, reverse=True):
        own = [taken for tree, taken in run.parts.items() if tree not in counted]
        counted.update(run.parts)
        size, files = sum(taken.size for taken in own), sum(taken.files for taken in own)
        items.append(replace(run.item, size=size, files=run.item.files + files))
    return items

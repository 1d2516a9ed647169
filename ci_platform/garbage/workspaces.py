"""Workspaces of runs that have ended, and what failed commands left in any: nobody can make these again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio.to_thread

from ci_platform.errors import NotFoundError
from ci_platform.garbage import Allowance, Item
from ci_platform.origins import Origin
from ci_platform.stacks import Layer, Stack
from ci_platform.workspaces import Workspaces

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

    def _of(self, stack: Stack, in_use: Collection[Path]) -> Iterable[Item]:
        origin = origin_of(stack)
        try:
            kept = stack.kept() if origin is not None else []
        except FileNotFoundError:
            return  # one of them is being removed
        for layer in kept:
            taken = _Taken().plus(layer)
            used_at = datetime.fromtimestamp(int(layer.folder.name) / 1e9, UTC)
            yield Item(
                f"{stack.folder.name}/{layer.folder.name}",
                None if origin is None else origin.repo,
                taken.size,
                used_at,
                taken.files,
                "a reader stands on it" if layer.tree in in_use else None,
                used_at + self._kept_for,
            )

    async def collect(self, name: str) -> bool:
        """Delete one, unless somebody looks at it."""
        workspace_id, _, folder = name.partition("/")
        return await self._workspaces.remove_failure(workspace_id, folder)


@dataclass(frozen=True, slots=True)
class _Taken:
    """What some layers take: what is written down of each, since looking at millions of files takes minutes."""

    size: int = 0
    files: int = 0

    def plus(self, layer: Layer) -> _Taken:
        return _Taken(
            self.size + (layer.record.get("size") or 0), self.files + (layer.record.get("paths") or 0) + 4
        )


def stacks(root: Path) -> list[Stack]:
    """Return all workspaces on disk."""
    return [Stack(path) for path in root.glob("[!.]*")]


def origin_of(stack: Stack) -> Origin | None:
    """Return what a workspace was forked from, None where it is gone or collected."""
    try:
        return Origin.from_json(stack.describe())
    except NotFoundError:
        return None


def _look(stack: Stack) -> tuple[Origin, _Taken, datetime] | None:
    """Return what a workspace is of, takes, and when it was used; None where somebody takes it away just now."""
    origin, taken = origin_of(stack), _Taken(files=4)
    if origin is None:
        return None
    try:
        for layer in stack.layers():
            taken = taken.plus(layer)
        used_at = (stack.folder / "layers").stat().st_mtime
    except FileNotFoundError:
        return None
    return origin, taken, datetime.fromtimestamp(used_at, UTC)


def _runs(found_stacks: Sequence[Stack], still_open: Collection[str]) -> list[Item]:
    found = dict[str, Item]()
    for stack in found_stacks:
        seen, run_id = _look(stack), stack.folder.name.partition(".")[0]
        if seen is None:
            continue
        origin, taken, used_at = seen
        item = found.get(run_id, Item(run_id, origin.repo, 0, used_at, 0))
        found[run_id] = replace(
            item,
            size=item.size + taken.size,
            files=item.files + taken.files,
            used_at=max(item.used_at, used_at),
            pinned="the run has not ended" if run_id in still_open else None,
        )
    return list(found.values())

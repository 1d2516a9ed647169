"""Where workspaces are, and who uses them: found, taken back, deleted, collected, cleaned up after a kill."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread

from ci_platform import full_disk, layers
from ci_platform.errors import ConflictError, InvalidInputError
from ci_platform.layer_pool import LayerPool
from ci_platform.named_locks import NamedLocks
from ci_platform.open_trees import OpenTree
from ci_platform.stacks import COLLECTED, LayerAuthor, Stack, links_at

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(slots=True)
class State:
    """What this process knows of a workspace beyond its files."""

    lock: anyio.Lock = field(default_factory=anyio.Lock)
    last_order: int = 0
    started: set[LayerAuthor] = field(default_factory=set)


class WorkspacePlaces:
    """The folders of workspaces below `root`, and the trees of theirs that are open."""

    def __init__(self, root: Path, *, threads: int, look_only: bool = False) -> None:
        self._root, self._pool = root, LayerPool(root)
        self._limiter = anyio.CapacityLimiter(threads)
        self._states: dict[str, State] = {}
        self._open: dict[Path, OpenTree] = {}
        self._runs = NamedLocks()
        if not look_only:
            for name in (".new", ".trash"):
                (root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            root.chmod(0o700)

    async def _thread(self, function: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(full_disk.told(function), limiter=self._limiter)

    def _state(self, workspace_id: str) -> State:
        return self._states.setdefault(workspace_id, State())

    def _stack(self, workspace_id: str) -> Stack:
        if not _ID.fullmatch(workspace_id):
            raise InvalidInputError(f"a workspace id has letters, digits and _.-, got {workspace_id[:140]!r}")
        return Stack(self._root / workspace_id)

    def in_use(self) -> set[Path]:
        """Return the trees that commands and readers stand on now."""
        return {lower for opened in self._open.values() for lower in opened.lowers}

    def _trash(self, path: Path) -> Path:
        """Take a folder out of sight by a rename; removing it may take long."""
        trash = self._root / ".trash" / secrets.token_hex(8)
        with contextlib.suppress(FileNotFoundError):
            path.rename(trash)
        return trash

    def _remove(self, *paths: Path) -> None:
        for path in paths:
            layers.remove_tree(self._trash(path))

    def _unlink(
        self, places: Collection[Path], links: Iterable[Path], in_use: Collection[Path]
    ) -> list[Path]:
        """Remove folders or links, `links` being all in them; returns the layers to remove that nobody has now."""
        trees = self._pool.shared(links)
        self._remove(*places)
        return self._pool.let_go(trees, in_use, self._root / ".trash")

    def _unlink_layers(self, places: Collection[Path], in_use: Collection[Path]) -> list[Path]:
        return self._unlink(places, [link for place in places for link in links_at(place)], in_use)

    def _remove_workspace(self, stack: Stack, in_use: Collection[Path]) -> None:
        self._remove(*self._unlink([stack.folder], list(stack.links()), in_use))

    async def abandon(self, scratch: Path) -> None:
        """Remove a workspace that was not finished, and layers that nobody has besides; nothing where it is."""
        in_use = self.in_use()
        with anyio.CancelScope(shield=True):
            await self._thread(lambda: self._remove_workspace(Stack(scratch), in_use))

    async def _let_go(self, trees: Collection[Path]) -> None:
        """Remove those of some trees that are of layers which nobody has any more."""
        in_use, trash = self.in_use(), self._root / ".trash"
        with anyio.CancelScope(shield=True):
            await self._thread(lambda: self._remove(*self._pool.let_go(trees, in_use, trash)))

    async def rewind(self, workspace_id: str, steps: Collection[tuple[str, int]]) -> int:
        """Forget the layers of these (step, count); returns how many there were. The files go when unused."""
        stack, state = self._stack(workspace_id), self._state(workspace_id)
        async with state.lock:
            return await self._thread(lambda: _rewind(stack, steps))

    async def rewind_run(self, run_id: str, steps: Collection[tuple[str, int]]) -> None:
        """Forget what these (step, count) changed in any workspace of a run."""
        for workspace_id in await self.of_run(run_id):
            await self.rewind(workspace_id, steps)

    async def of_run(self, run_id: str) -> list[str]:
        """Return the ids of a run's workspaces: those that start with its id and a dot."""
        self._stack(run_id)
        found = await self._thread(lambda: sorted(self._root.glob(f"{run_id}.*")))
        return [path.name for path in found]

    async def delete(self, workspace_id: str) -> None:
        """Remove a workspace; nothing where there is none. ConflictError while a command uses it."""
        stack, state = self._stack(workspace_id), self._state(workspace_id)
        async with state.lock:
            opened = [each for each in self._open.values() if each.workspace_id == workspace_id]
            if not all(each.is_view for each in opened):
                raise ConflictError(f"the workspace {workspace_id!r} is in use")
            in_use = self.in_use()
            await self._thread(lambda: self._remove_workspace(stack, in_use))
        self._states.pop(workspace_id, None)

    async def delete_run(self, run_id: str) -> None:
        """Remove all workspaces of a run."""
        for workspace_id in await self.of_run(run_id):
            await self.delete(workspace_id)

    async def sweep(self, live: Collection[str] | None = None) -> int:
        """Remove what a killed process left half done; call once at start. Returns the workspaces removed.

        `live` names runs or workspaces (a run's have ids that start with its id and a dot); others are removed.
        None keeps all.
        """
        return await self._thread(lambda: self._sweep(live))

    def _sweep(self, live: Collection[str] | None) -> int:
        for folder in (self._root / ".new", self._root / ".trash"):
            for path in folder.iterdir():
                layers.remove_tree(path)
        removed, in_use = 0, self.in_use()
        for path in self._root.glob("[!.]*"):
            self._remove(*Stack(path).rubbish())
            if live is None or path.name in live or path.name.partition(".")[0] in live:
                for leftover in (*path.glob("pending/*"), *Stack(path).garbage(in_use)):
                    if leftover not in self._open:  # its command goes on
                        self._remove(leftover)
            else:
                self._remove(path)
                removed += 1
        links = (link for path in self._root.glob("[!.]*") for link in Stack(path).links())
        self._remove(*self._pool.sweep(links, in_use, self._root / ".trash"))
        return removed

    # Garbage

    @property
    def root(self) -> Path:
        """The folder of all workspaces."""
        return self._root

    @asynccontextmanager
    async def settled(self, run_id: str) -> AsyncIterator[None]:
        """Keep a run's workspaces from being collected, or from being counted upon, for the time of the block."""
        async with self._runs(run_id):
            yield

    @asynccontextmanager
    async def rerunning(self, run_id: str) -> AsyncIterator[None]:
        """Have a run's workspaces stay as they are until it is open; ConflictError where they were collected."""
        async with self.settled(run_id):
            if any(self._stack(each).is_collected() for each in await self.of_run(run_id)):
                raise ConflictError(f"the run has no workspaces any more: {COLLECTED}")
            yield

    async def collect(self, workspace_id: str) -> bool:
        """Delete a workspace's files, so that it says so of itself; False while something uses it."""
        stack, state = self._stack(workspace_id), self._state(workspace_id)
        async with state.lock:
            if any(opened.is_of(stack.folder) for opened in self._open.values()):
                return False
            in_use = self.in_use()
            await self._thread(lambda: self._collect(stack, in_use))
        self._states.pop(workspace_id, None)
        return True

    def _collect(self, stack: Stack, in_use: Collection[Path]) -> None:
        stack.collect()
        self._remove(*self._unlink(stack.rubbish(), list(stack.links()), in_use))

    async def remove_failure(self, workspace_id: str, name: str) -> bool:
        """Delete what a failed command left, by the name of its folder; False while it is looked at."""
        stack = self._stack(workspace_id)
        async with self._state(workspace_id).lock:
            in_use = self.in_use()
            return await self._thread(lambda: self._remove_failure(stack, name, in_use))

    def _remove_failure(self, stack: Stack, name: str, in_use: Collection[Path]) -> bool:
        kept = [layer for layer in stack.kept() if layer.place.name == name]
        if any(tree in in_use for layer in kept for tree in layer.trees):
            return False
        self._remove(*self._unlink_layers([layer.place for layer in kept], in_use))
        return True


def _rewind(stack: Stack, steps: Collection[tuple[str, int]]) -> int:
    forgotten = [layer for layer in stack.layers() if (layer.author.step, layer.author.count) in steps]
    for layer in forgotten:
        layer.forget()
    return len(forgotten)

"""Workspaces: a commit's files, and on top of them one layer for each command that succeeded.

On disk, below the root: `<workspace id>/workspace.json`, `pending/` (commands that run), and as links to layers in the
pool (see `ci_platform.layer_pool`) `layers/<order>`, `kept/` (what failed commands left), `squashed/` (layers merged
for speed, made again when missing). Each step from one state to the next is one rename or one link.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from ci_platform import copy_on_write, layer_views, layers, sealing
from ci_platform.commit_reports import CommitReport, Conflict, conflicts_with, describe
from ci_platform.cones import Cone
from ci_platform.copy_on_write import Method
from ci_platform.errors import ConflictError, LimitExceededError, UnavailableError
from ci_platform.grafts import Grafts
from ci_platform.hydration.mounts import LazyLower
from ci_platform.layer_pool import Part
from ci_platform.open_trees import LOOKER, OpenTree, letting_go_of
from ci_platform.origins import Origin
from ci_platform.sandboxes import SANDBOX_UID, Tree
from ci_platform.snapshots import Snapshot, View, layer_facts, snapshots_of
from ci_platform.source import Checkout, GitFolder, Source, check_repo, check_sha
from ci_platform.stacks import LayerAuthor, Stack
from ci_platform.trees import Owner
from ci_platform.workspace_places import WorkspacePlaces
from pipelines.contract import Workspace

T = TypeVar("T")

__all__ = ["CommitReport", "Conflict", "LayerAuthor", "Workspaces", "describe"]

_KEPT_FAILURES = 3
"""Of one workspace: enough to compare attempts, little enough to forget about."""


class Workspaces(WorkspacePlaces):
    """All workspaces of a platform.

    *Order of calls*: `sweep` once at start; `fork`, then any number of `prepare` -> `commit` or `drop`.
    *Concurrency*: one event loop, one process; trees of one workspace may be open side by side, and stack in the
    order of their commits. *Idempotency*: `fork`, `rewind`, `delete`, `drop`. *Cancellation*: a call in progress
    ends its work on disk first. *Errors*: NotFoundError for a workspace that is not there, LimitExceededError
    where a command left what cannot be kept.

    With `durable`, a layer is flushed before `commit` returns, so it survives a power cut. `look_only`: nothing will
    be asked for that writes, so that not even folders are made.
    """

    def __init__(
        self,
        root: Path,
        source: Source,
        method: Method,
        *,
        grafts: Grafts | None = None,
        durable: bool = True,
        threads: int = 4,
        look_only: bool = False,
    ) -> None:
        super().__init__(root, threads=threads, look_only=look_only)
        self._source, self._method, self._durable = source, method, durable
        self._grafts = grafts
        self._owner = Owner.of_sandboxes(SANDBOX_UID)

    async def fork(
        self,
        workspace_id: str,
        repo: str,
        sha: str,
        *,
        cone: Cone | None = None,
        alone: bool = False,
        submodules: bool = False,
        lfs: bool = False,
    ) -> Workspace:
        """Make a workspace of a commit that `source` has; a millisecond or two where its tree is on disk.

        Of a `cone`, its folders alone are on disk. Its `.git` reaches the whole repository; with `alone`, this
        commit, as do those of `submodules`. With `lfs`, files that LFS keeps are in it. Forking again in the same way
        changes nothing; in another way it is a ConflictError.
        """
        stack = self._stack(workspace_id)
        wanted = Origin(check_repo(repo), check_sha(sha), cone, alone, submodules=submodules, lfs=lfs)
        if not await self._exists(stack):
            found = await self._grafts.find(wanted) if self._grafts else wanted
            checkout = await self._checkout(found, lazy=True)
            record = replace(found, git=checkout.git, layer=checkout.modules).as_json()
            await self._create(stack, record)
        await self._check_origin(stack, wanted)
        return Workspace(workspace_id, repo, sha)

    async def _exists(self, stack: Stack) -> bool:
        """Whether a workspace is there. One whose files were collected makes place for a new one."""
        async with self._state(stack.folder.name).lock:
            if await self._thread(stack.is_collected):
                in_use = self.in_use()
                await self._thread(lambda: self._remove_workspace(stack, in_use))
            return await self._thread(stack.exists)

    async def _check_origin(self, stack: Stack, wanted: Origin) -> None:
        found = Origin.from_json(await self._thread(stack.describe))
        if found.asked() != wanted.asked():
            raise ConflictError(f"the workspace {stack.folder.name!r} is of {found}, not of {wanted}")

    async def _create(self, stack: Stack, record: Mapping[str, Any], own: Sequence[Part] = ()) -> None:
        scratch = self._root / ".new" / secrets.token_hex(8)
        try:
            await self._thread(lambda: stack.create(scratch, record, own, durable=self._durable))
        except BaseException:
            await self.abandon(scratch)
            raise

    async def fork_snapshot(self, workspace_id: str, source_id: str, name: str) -> Workspace:
        """Make a workspace that begins as a snapshot of another one. Again is the same; see `fork`."""
        stack = self._stack(workspace_id)
        origin = Origin.from_json(await self._thread(self._stack(source_id).describe))
        wanted = replace(origin, snapshot=f"{source_id}@{name}")
        if not await self._exists(stack):
            async with self.view(source_id, name) as view:
                await self._create(stack, wanted.as_json(), view.own)
        await self._check_origin(stack, wanted)
        return Workspace(workspace_id, origin.repo, origin.sha)

    @asynccontextmanager
    async def view(self, workspace_id: str, name: str) -> AsyncIterator[View]:
        """Show a snapshot (see `Stack.snapshot`) for the time of the block, even if the workspace is deleted."""
        stack = self._stack(workspace_id)
        pin = Path("view", secrets.token_hex(8))
        async with self._state(workspace_id).lock:
            base = await self._base(stack)
            own = tuple(await self._thread(lambda: stack.snapshot(name)))
            lowers = (*(part.tree for part in own), *base)
            self._open[pin] = OpenTree(workspace_id, pin, LOOKER, 0, (), lowers)
        try:
            yield View(own, lowers)
        finally:
            self._open.pop(pin)
            await self._let_go(lowers)

    async def snapshots(self, workspace_id: str) -> list[Snapshot]:
        """Return what of a workspace can be looked at or forked: the fork, then each layer, then failed commands."""
        return await self._thread(lambda: snapshots_of(self._stack(workspace_id)))

    async def _checkout(self, origin: Origin, *, lazy: bool = False) -> Checkout:
        folder = GitFolder(origin.sha, origin.cone, alone=origin.alone, copied=not self._method.mounts)
        lazy = lazy and self._method.name == "overlay" and not (origin.submodules or origin.lfs)
        checkout = await self._source.checkout(origin.repo, folder, origin.git, lazy=lazy)
        return await self._grafts.onto(checkout, origin, folder) if self._grafts else checkout

    async def _base(self, stack: Stack) -> tuple[Path, ...]:
        """Return the layers that all of a workspace's own stand on."""
        record = await self._thread(stack.describe)
        return (await self._checkout(Origin.from_json(record))).lowers

    async def _lazy_base(self, stack: Stack) -> tuple[tuple[Path, ...], LazyLower | None]:
        """Return the same, and where the last one is not on disk yet, what it is mounted from."""
        origin = Origin.from_json(await self._thread(stack.describe))
        found = await self._checkout(origin, lazy=True)
        hold = await self._source.hold(origin.repo, found)
        if found.lazy is None or hold is not None:
            return found.lowers, hold
        return (await self._checkout(origin)).lowers, None

    async def prepare(self, workspace_id: str, author: LayerAuthor, *, lazy: bool = False) -> Tree:
        """Return a tree for one command: the workspace as it stands, with changes going to a layer of its own.

        Forgets first what earlier attempts of the same step left, and what the same attempt left in a process
        that died before its step was recorded. `lazy` says that the tree may be one that has to be mounted.
        """
        stack, state = self._stack(workspace_id), self._state(workspace_id)
        async with state.lock:
            base, hold = await self._lazy_base(stack) if lazy else (await self._base(stack), None)
            first, in_use = author not in state.started, self.in_use()
            # Shielded: a folder that nobody knows of would stay until the next start.
            with anyio.CancelScope(shield=True), letting_go_of(hold):
                opened = await self._thread(lambda: self._prepare(stack, author, base, in_use, first=first))
            state.started.add(author)
            state.last_order = max(opened.seen, state.last_order)
            opened = replace(opened, seen=state.last_order, hold=hold)
            self._open[opened.folder] = opened
        return opened.tree if self._method.mounts else await self._copy(opened)

    def describe_open(self, tree: Tree) -> dict[str, Any] | None:
        """Return what a later process needs to `reopen` a tree; None where it is a copy, which none can."""
        opened = self._opened(tree)
        return opened.as_plain() if self._method.mounts else None

    def reopen(self, told: Mapping[str, Any]) -> Tree | None:
        """Hold a tree that a command of an earlier process still uses; call before `sweep`. None: it is gone."""
        opened = OpenTree.from_plain(told)
        if opened is None or not opened.is_here:
            return None
        self._open[opened.folder] = opened
        return opened.tree

    async def check(self, tree: Tree) -> None:
        """Raise UnavailableError if a command may not have seen all files as they are: those of a lazy tree were lost.

        From then on the tree is used when it is on disk.
        """
        opened = self._opened(tree)
        if (hold := opened.hold) is not None:
            try:
                await self._thread(hold.check)
            except UnavailableError as error:
                self._source.hydration.distrust(opened.lowers[-1].parent, str(error))
                raise

    async def adopt(self, tree: Tree, author: LayerAuthor) -> None:
        """Take a reopened tree for this attempt's; forgets what earlier attempts of its step have left."""
        opened = self._opened(tree)
        stack, state = self._stack(opened.workspace_id), self._state(opened.workspace_id)
        async with state.lock:
            first = author not in state.started
            await self._thread(lambda: _forget_earlier(stack, author, first=first))
            state.started.add(author)
            state.last_order = max(state.last_order, await self._thread(stack.newest_order))
            self._open[opened.folder] = replace(opened, author=author)

    def _prepare(
        self, stack: Stack, author: LayerAuthor, base: tuple[Path, ...], in_use: set[Path], *, first: bool
    ) -> OpenTree:
        _forget_earlier(stack, author, first=first)
        live = stack.layers()
        own, outdated = stack.lowers(live)
        self._remove(*self._unlink_layers(outdated, in_use))
        folder = stack.folder / "pending" / secrets.token_hex(8)
        (folder / "work").mkdir(parents=True)
        if self._method.mounts:
            self._own(folder / "tree")
        on = tuple(layer.order for layer in live)
        return OpenTree(stack.folder.name, folder, author, stack.newest_order(), on, (*own, *base))

    def _own(self, path: Path) -> None:
        """Make the root of an overlay, which the sandbox's uid may write to."""
        path.mkdir()
        if os.geteuid() == 0:
            os.chown(path, self._owner.uid, self._owner.gid)
        path.chmod(0o755)

    async def _copy(self, opened: OpenTree) -> Tree:
        """Copy the merged view, for machines without overlayfs."""
        copy, clone = opened.folder / "copy", self._method.name == "reflink"
        try:
            stamps = await self._thread(lambda: copy_on_write.copy_view(opened.lowers, copy, clone=clone))
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._discard(opened)
            raise
        self._open[opened.folder] = replace(opened, stamps=stamps)
        return Tree(copy, opened.folder / "work")

    def _opened(self, tree: Tree) -> OpenTree:
        try:
            return self._open[tree.upper.parent]
        except KeyError:
            raise ConflictError(f"the tree {tree.upper} is not open (any more)") from None

    async def commit(self, tree: Tree) -> CommitReport:
        """Make what the command changed part of the workspace, by one rename. Nothing may use the tree any more.

        Where it cannot be kept (LimitExceededError) the tree is dropped.
        """
        opened = self._opened(tree)
        with anyio.CancelScope(shield=True):
            try:
                report = await self._commit(opened)
            finally:
                await self._discard(opened)
        return report

    async def _commit(self, opened: OpenTree) -> CommitReport:
        sealed = await self._thread(lambda: self._seal(opened, durable=self._durable))
        if sealed.paths == 0:
            return CommitReport(None)
        state = self._state(opened.workspace_id)
        async with state.lock:
            opened = await self._to_look_into(opened)
            order = state.last_order + 1
            conflicts = await self._thread(lambda: self._publish(opened, order, sealed))
            state.last_order = order
        return CommitReport(order, sealed.paths, sealed.size, conflicts)

    def _seal(self, opened: OpenTree, *, durable: bool) -> sealing.Sealed:
        upper = opened.folder / "tree"
        if opened.stamps is not None:
            copy_on_write.capture(opened.folder / "copy", opened.stamps, upper)
            layers.remove_tree(opened.folder / "copy")
        layers.remove_tree(opened.folder / "work")
        return sealing.seal(upper, self._owner, durable=durable)

    async def _to_look_into(self, opened: OpenTree) -> OpenTree:
        """Return a tree with layers on disk, where siblings of a lazy one have been committed."""
        stack = self._stack(opened.workspace_id)
        if opened.hold is None or await self._thread(stack.newest_order) <= opened.seen:
            return opened
        own = [lower for lower in opened.lowers if lower.is_relative_to(self._root)]
        return replace(opened, lowers=(*own, *await self._base(stack)))

    def _publish(self, opened: OpenTree, order: int, sealed: sealing.Sealed) -> tuple[Conflict, ...]:
        stack, upper = self._stack(opened.workspace_id), opened.folder / "tree"
        siblings = [layer for layer in stack.layers() if layer.order > opened.seen]
        conflicts = conflicts_with(upper, siblings)
        if siblings:
            sealing.let_siblings_through(upper, opened.lowers)
        facts = layer_facts(sealed.paths, sealed.size, opened.on, conflicts)
        stack.publish(opened.folder, order, opened.author, facts, durable=self._durable)
        return conflicts

    async def drop(self, tree: Tree, *, keep: bool = False) -> None:
        """Forget what a command changed; with `keep` set it aside for a post-mortem (the last three are kept)."""
        opened = self._open.get(tree.upper.parent)
        if opened is None:
            return
        with anyio.CancelScope(shield=True):
            outdated = await self._thread(lambda: self._keep(opened)) if keep else []
            await self._discard(opened, outdated)

    def _keep(self, opened: OpenTree) -> list[Path]:
        """Set aside what a command left; returns older ones to remove."""
        try:
            sealed = self._seal(opened, durable=False)
        except LimitExceededError:
            return []  # what cannot be a layer cannot be looked at
        facts = layer_facts(sealed.paths, sealed.size, opened.on)
        stack = self._stack(opened.workspace_id)
        return stack.keep(opened.folder, opened.author, facts, _KEPT_FAILURES)

    async def _discard(self, opened: OpenTree, outdated: Sequence[Path] = ()) -> None:
        """Let go of a tree and of everything that only it still needed; and of what was kept too long."""
        stack = self._stack(opened.workspace_id)
        async with self._state(opened.workspace_id).lock:
            self._open.pop(opened.folder, None)
            if opened.hold is not None:
                opened.hold.close()
            in_use = self.in_use()
            unused = await self._thread(lambda: self._unused(stack, opened, outdated, in_use))
        await self._thread(lambda: self._remove(opened.folder, *unused))

    def _unused(
        self, stack: Stack, opened: OpenTree, outdated: Sequence[Path], in_use: set[Path]
    ) -> list[Path]:
        unused = self._unlink_layers([*outdated, *stack.garbage(in_use)], in_use)
        return [*unused, *self._pool.let_go(opened.lowers, in_use, self._root / ".trash")]

    async def read(self, workspace_id: str, path: str, *, limit: int = 1 << 20) -> bytes | None:
        """Return a regular file as the workspace stands, None where there is none or it is a link."""
        stack = self._stack(workspace_id)
        async with self._state(workspace_id).lock:
            base = await self._base(stack)
            return await self._thread(lambda: layer_views.read((*stack.live_trees(), *base), path, limit))


def _forget_earlier(stack: Stack, author: LayerAuthor, *, first: bool) -> None:
    for layer in stack.layers():
        if layer.author.same_step(author) and (first or layer.author.attempt < author.attempt):
            layer.forget()

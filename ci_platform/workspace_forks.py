"""Workspaces of a run made anew for another: the layers of the steps that it keeps, and a patch on top of them.

Layers are taken over under the orders that they have, each as one link to the pool: what a layer cost it costs once.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread

from ci_platform import patches, patching, sealing
from ci_platform.errors import ConflictError, InvalidInputError, NotFoundError, PatchError
from ci_platform.layer_pool import LayerPool, Part
from ci_platform.lineage import in_run, workspace_id_of
from ci_platform.origins import Origin
from ci_platform.sandboxes import SANDBOX_UID
from ci_platform.snapshots import layer_facts
from ci_platform.stacks import Layer, LayerAuthor, Stack, trees_of
from ci_platform.trees import Owner
from ci_platform.workspaces import Workspaces

T = TypeVar("T")
Steps = Collection[tuple[str, int]]

PATCH = LayerAuthor("(patch)", 0, 0)
"""The author of a patch's layer: no step has the number 0."""


@dataclass(frozen=True, slots=True)
class Patch:
    """A patch for one of a run's workspaces; `workspace` is its id there. `files` are what it changes."""

    text: str
    workspace: str
    files: tuple[str, ...] = ()


class WorkspaceForks:
    """Copies the workspaces of runs.

    *Order of calls*: `check`, then `fork`, which may be repeated. *Concurrency*: nothing may rewind or delete the
    source's workspaces meanwhile. *Cancellation*: a call in progress ends its work on disk first. *Errors*:
    PatchError where a patch does not fit.
    """

    def __init__(self, root: Path, workspaces: Workspaces, *, durable: bool = True) -> None:
        self._root, self._workspaces, self._durable = root, workspaces, durable
        self._owner = Owner.of_sandboxes(SANDBOX_UID)

    def staying(self, run_id: str) -> AbstractAsyncContextManager[None]:
        """Have a run's workspaces stay for the time of the block. Raises ConflictError where they were collected."""
        return self._workspaces.rerunning(run_id)

    async def of_run(self, run_id: str) -> list[str]:
        """Return the ids of a run's workspaces."""
        return await self._workspaces.of_run(run_id)

    async def check(self, source: str, kept: Steps, text: str, step: str | None = None) -> Patch:
        """Return the patch as it fits onto what the steps `kept` of a run have left. Nothing is written.

        It is for the workspace that `step` forked, which may be left out where there is one alone.
        """
        try:
            parsed = patches.parse(text.encode())
        except UnicodeEncodeError as error:
            raise PatchError(f"a patch is text: {error}") from None
        found = await self._of(source, kept)
        named = [workspace_id_of(source, name, count) for name, count in kept if name == step]
        chosen = [each for each in found if step is None or each in named]
        if not chosen:
            which = "no workspace" if step is None else f"no workspace of a step {step[:100]!r}"
            raise InvalidInputError(f"there is {which} before that step: nothing to patch")
        if len(chosen) > 1:
            names = ", ".join(each.partition(".")[2] for each in chosen)
            raise InvalidInputError(
                f"say which workspace the patch is for, by the step that forked it: {names}"
            )
        async with self._workspaces.view(chosen[0], "0") as view:
            stack = Stack(self._root / chosen[0])
            plan = await _thread(lambda: patching.plan(parsed, [*trees_of(_kept(stack, kept)), *view.lowers]))
        return Patch(text, chosen[0], tuple(plan.changes))

    async def fork(self, source: str, run_id: str, kept: Steps, patch: Patch | None) -> None:
        """Make the workspaces of a run out of another's. What is there already stays."""
        for workspace_id in await self._of(source, kept):
            target = Stack(self._root / str(in_run(workspace_id, run_id, [source])))
            mine = patch if patch is not None and patch.workspace == workspace_id else None
            stack, base = Stack(self._root / workspace_id), tuple[Path, ...]()
            async with AsyncExitStack() as views:
                if mine is not None:  # else nobody looks at the commit's files, which may not be on disk yet
                    view = await views.enter_async_context(self._workspaces.view(workspace_id, "0"))
                    base = view.lowers
                with anyio.CancelScope(shield=True):
                    await self._make(lambda scratch: self._fork(stack, target, scratch, kept, base, mine))  # noqa: B023

    async def _make(self, make: Callable[[Path], None]) -> None:
        scratch = self._root / ".new" / secrets.token_hex(8)
        try:
            await _thread(lambda: make(scratch))
        except BaseException:
            await self._workspaces.abandon(scratch)
            raise

    async def _of(self, run_id: str, kept: Steps) -> list[str]:
        """Return the workspaces of a run that steps of `kept` have forked."""
        wanted = {workspace_id_of(run_id, name, count) for name, count in kept}
        return [each for each in await self._workspaces.of_run(run_id) if each in wanted]

    def _fork(
        self,
        source: Stack,
        target: Stack,
        scratch: Path,
        kept: Steps,
        base: Sequence[Path],
        patch: Patch | None,
    ) -> None:
        if target.exists():
            return
        for name in ("layers", "pending", "squashed"):
            (scratch / name).mkdir(parents=True)
        taken = _kept(source, kept)
        for layer in taken:
            self._take(layer, scratch / "layers" / layer.place.name)
        for number, part in enumerate(source.merges(trees_of(taken)[::-1])):
            source.pool.show(part, scratch / "squashed" / f"{number}")
        if patch is not None:
            self._patch(scratch, source, taken, base, patch)
        target.put(scratch, source.describe(), durable=self._durable)

    def _take(self, layer: Layer, place: Path) -> None:
        try:
            layer.take(place, LayerPool(self._root), durable=self._durable)
        except FileNotFoundError:
            raise NotFoundError(f"what step {layer.author.step!r} has left is gone") from None

    def _patch(
        self, scratch: Path, source: Stack, taken: Sequence[Layer], base: Sequence[Path], patch: Patch
    ) -> None:
        plan = patching.plan(patches.parse(patch.text.encode()), [*trees_of(taken), *base])
        order = max((layer.order for layer in taken), default=0) + 1
        own = scratch / "pending" / "patch"
        (own / "tree").mkdir(parents=True)
        (own / "tree").chmod(0o755)
        plan.write(own / "tree", self._owner)
        sealed = sealing.seal(own / "tree", self._owner, durable=self._durable)
        facts = layer_facts(sealed.paths, sealed.size, [layer.order for layer in taken]) | asdict(PATCH)
        tree = source.pool.add(own, facts, durable=self._durable)
        source.pool.show(Part(tree, facts), scratch / "layers" / f"{order:08d}")


def _kept(stack: Stack, kept: Steps) -> list[Layer]:
    """Return the layers of some steps, and those that are of no step: an earlier patch, a snapshot's first."""
    try:
        from_snapshot = Origin.from_json(stack.describe()).snapshot is not None
        return [
            layer
            for layer in stack.layers()
            if (layer.author.step, layer.author.count) in kept
            or layer.author == PATCH
            or (from_snapshot and layer.order == 1)
        ]
    except FileNotFoundError:
        raise ConflictError(f"the workspace {stack.folder.name!r} is being changed: try again") from None


async def _thread(function: Callable[[], T]) -> T:
    return await anyio.to_thread.run_sync(function)

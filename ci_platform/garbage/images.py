"""Images that runs have made: builds, and snapshots of installs, which the next run that asks for one makes anew."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import datetime
from typing import Any

import anyio

from ci_platform.errors import UnavailableError
from ci_platform.garbage import Allowance, Item
from ci_platform.images import PinnedImages
from ci_platform.model import RunImage, SnapshotImage
from ci_platform.sandboxes import ImageMaker, MadeImage
from ci_platform.store import Store, Transaction, col

_PATIENCE = 20.0
"""Seconds: an engine looks through all that its images and containers have on disk."""


class MadeImages:
    """Images of this platform's making in an engine of containers. Others, pulled ones too, are not its own."""

    kind = "images"

    def __init__(
        self,
        maker: ImageMaker,
        images: PinnedImages,
        store: Store,
        allowance: Allowance,
        *,
        still_open: Callable[[], Awaitable[Collection[str]]],
        patience: float = _PATIENCE,
    ) -> None:
        self.allowance, self._patience = allowance, patience
        self._maker, self._images, self._store, self._still_open = maker, images, store, still_open

    async def items(self) -> Sequence[Item]:
        """Return all images that runs have made. Raises UnavailableError where the engine does not answer."""
        made, wanted = await self._made(), await self._wanted()
        repos, used_at = await self._store.read(_known)
        return [
            Item(
                each.exact,
                repos.get(each.exact),
                each.size,
                max(each.made_at, used_at.get(each.exact, each.made_at)),
                pinned="a run that has not ended may use it" if each.exact in wanted else None,
            )
            for each in made
        ]

    async def _made(self) -> list[MadeImage]:
        """Ask an engine that may take minutes to count: other garbage does not wait for that."""
        with anyio.move_on_after(self._patience):
            return await self._maker.made()
        raise UnavailableError(f"the engine does not say within {self._patience:g} s what its images take")

    async def _wanted(self) -> set[str]:
        still_open = await self._still_open()
        return {exact for run_id, exact in await self._given() if run_id in still_open}

    async def _given(self, *where: Any) -> Sequence[tuple[str, str]]:
        """Return which run was given which image."""
        return await self._store.read(
            lambda tx: tx.values((col(RunImage.run_id), col(RunImage.exact)), *where)
        )

    async def collect(self, name: str) -> bool:
        """Delete one, unless a run was given it by now or a container uses it."""
        async with self._images.settled(name):
            given, still_open = await self._given(col(RunImage.exact) == name), await self._still_open()
            if any(run_id in still_open for run_id, _ in given):
                return False
            return await self._maker.remove_made(name)


def _known(tx: Transaction) -> tuple[dict[str, str], dict[str, datetime]]:
    """Return the repositories of snapshots, and when images were given to a run last, by exact name."""
    used_at = dict[str, datetime]()
    for exact, pinned_at in tx.values((col(RunImage.exact), col(RunImage.pinned_at))):
        used_at[exact] = max(pinned_at, used_at.get(exact, pinned_at))
    return dict(tx.values((col(SnapshotImage.exact), col(SnapshotImage.repo)))), used_at

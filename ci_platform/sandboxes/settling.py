"""Mounts of commands that are over, of which the kernel is not done with letting go: a file looked at takes it 2 µs.

The end of a command need not wait for that; but what the command has changed is no layer of another mount before.
"""

from __future__ import annotations

from pathlib import Path

import anyio

from ci_platform.sandboxes import SandboxJob, Tree
from ci_platform.sandboxes.berths import Berth

_WAITS = 30.0
"""Seconds that a command waits at most for the mounts of those before it: a million files take two."""


class Settling:
    """The sandboxes of such commands, by the folders that took their changes."""

    def __init__(self) -> None:
        self._berths: dict[tuple[int, int], Berth] = {}
        self._turn = anyio.Lock()

    def keep(self, tree: Tree, berth: Berth) -> None:
        """Keep the sandbox of a command whose mounts are not gone yet."""
        if not self._turn.locked():  # else somebody waits for one of them
            for identity in [each for each, kept in self._berths.items() if kept.has_news()]:
                self._berths.pop(identity).close()
        if berth.is_settling:
            self._berths[_identity(tree.upper)] = berth.moved()

    async def wait(self, job: SandboxJob) -> None:
        """Wait for those whose changes a job stands on."""
        if not self._berths:
            return
        folders = [folder for each in _trees(job) for folder in (each.upper, *each.lowers)]
        async with self._turn:  # side by side, jobs would wait for the same
            for identity in {_identity(folder) for folder in folders} & self._berths.keys():
                with anyio.move_on_after(_WAITS):
                    await self._berths[identity].settled()
                if (berth := self._berths.pop(identity, None)) is not None:  # else all was closed meanwhile
                    berth.close()

    def close(self) -> None:
        """Wait for nobody any more."""
        while self._berths:
            self._berths.popitem()[1].close()


def _trees(job: SandboxJob) -> list[Tree]:
    return [job.tree, *(mount.tree for mount in job.mounts)]


def _identity(folder: Path) -> tuple[int, int]:
    """Return what a folder is whatever its name: layers are moved when they are done."""
    try:
        found = folder.stat()
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino

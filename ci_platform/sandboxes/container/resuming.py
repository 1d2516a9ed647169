"""Going on with commands that an earlier process of the platform has left in its containers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import anyio

from ci_platform.sandboxes import Output, SandboxJob, SandboxOutcome
from ci_platform.sandboxes.container import places, survivors
from ci_platform.sandboxes.container.engine import Engine, remove
from ci_platform.sandboxes.container.places import Pipe, Place
from ci_platform.sandboxes.container.survivors import Survivor
from ci_platform.sandboxes.container.tails import KILLED, Tail

_LOOK_EVERY = 0.1
"""Seconds between two looks at a command that another process has started: the engine tells its end to that alone."""


@dataclass
class Resuming:
    """The commands of earlier processes. A container is removed at its command's end, its place when that is settled.

    `leaving`: this process ends, and leaves commands alone where it is cancelled.
    """

    engine: Engine
    leaving: bool = False
    _unsettled: dict[Path, Survivor] = field(default_factory=dict)

    async def resume(self, job: SandboxJob, output: Output) -> SandboxOutcome | None:
        """Go on with the command in `job.survive`, from its first byte on. None: there is none (any more)."""
        folder = job.survive
        survivor = None if folder is None else await self.engine.finish(lambda: survivors.read(folder))
        if folder is None or survivor is None:
            return None
        place = Place(Path(survivor.place))
        pipe = Pipe(place, survivor.number)
        try:
            ended = await self._see_through(survivor, Tail(pipe, job.limits.output, output), job)
            if ended is not None:
                survivors.write(folder, ended)
        except BaseException:
            if not self.leaving:
                await self.abandon(folder)
            raise
        finally:
            pipe.close()
        if ended is None:
            await self.abandon(folder)
            return None
        self._unsettled[folder] = ended
        await self.engine.shielded(lambda client: remove(client, survivor.container))
        await self.engine.finish(place.hide)
        return SandboxOutcome(ended.code or 0, ended.reason, timedelta(seconds=ended.seconds))

    async def abandon(self, folder: Path) -> None:
        """Kill the command of a folder, and forget it."""
        survivor = await self.engine.finish(lambda: survivors.read(folder))
        if survivor is not None:
            await self.engine.shielded(lambda client: remove(client, survivor.container))
            survivors.forget(folder, survivor)
            await self.engine.finish(Place(Path(survivor.place)).remove)

    def settled(self, folder: Path) -> None:
        """Forget a command whose end is taken care of."""
        if (survivor := self._unsettled.pop(folder, None)) is not None:
            survivors.forget(folder, survivor)
            Place(Path(survivor.place)).remove()

    async def _see_through(self, survivor: Survivor, tail: Tail, job: SandboxJob) -> Survivor | None:
        await tail.repeat()
        if survivor.code is not None:
            return survivor
        left = job.limits.timeout.total_seconds() - (time.time() - survivor.began)

        async def wait() -> list[Survivor]:
            state: Survivor | None = survivor
            while state is survivor:
                state = await self.engine.call(lambda client: survivors.ended(client, survivor))
                await anyio.sleep(_LOOK_EVERY * (state is survivor))
            return [] if state is None else [state]

        found, reason = await tail.until_over(wait, max(0.0, left))
        seconds = time.time() - survivor.began
        if found is None:
            return replace(survivor, code=KILLED, reason=reason, seconds=seconds)
        if not found:
            return None
        if (
            found[0].code
            and reason == "exited"
            and places.killed_for_memory(survivor.container, survivor.pid)
        ):
            reason = "memory"
        return replace(found[0], reason=reason, seconds=seconds)

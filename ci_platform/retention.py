"""Retention: runs that ended long ago go, with their workspaces and instances, and their rows last.

With them goes what only time uses up: old logs, trees above their budget, loose objects of repositories.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import timedelta

from ci_platform.instances import WorkflowsBinding
from ci_platform.runs import Runs
from ci_platform.waking import Waker
from dynflow.clock import Clock
from dynflow.errors import InstanceNotFoundError

_log = logging.getLogger(__name__)

# Often enough that a disk does not fill between two looks, seldom enough to cost nothing.
_EVERY = timedelta(hours=1)

Delete = Callable[[str], Awaitable[object]]


class Retention:
    """Forgets runs. `files` delete what a run has on disk, by its id; each may be repeated. `tidy` does the rest."""

    def __init__(
        self,
        runs: Runs,
        workflows: WorkflowsBinding,
        clock: Clock,
        *,
        keep: timedelta,
        files: Sequence[Delete] = (),
        tidy: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._runs, self._workflows, self._clock = runs, workflows, clock
        self._keep, self._files, self._tidy = keep, files, tidy

    async def serve(self) -> None:
        """Forget what is due, now and every hour, for ever."""
        waker = Waker(self._clock)
        while True:
            try:
                await self.purge()
                if self._tidy is not None:
                    await self._tidy()
            except Exception:  # noqa: BLE001 - what could not be deleted is tried again; it must not stop the server
                _log.exception("some of what is too old could not be deleted")
            await waker.wait(self._clock.now() + _EVERY)

    async def purge(self) -> int:
        """Forget all runs that ended longer ago than is kept; return how many there were."""
        forgotten = 0
        while run_ids := await self._runs.expired(self._keep):
            for run_id in run_ids:
                await self._forget(run_id)
                forgotten += 1
        return forgotten

    async def _forget(self, run_id: str) -> None:
        for delete in self._files:
            await delete(run_id)
        with suppress(InstanceNotFoundError):
            await (await self._workflows.get(run_id)).delete()
        # The row last: until then a crash leaves something by which the rest is found.
        await self._runs.forget(run_id)

"""Runs that have ended or begun to wait, and what sandboxes keep for them: the one way by which it is let go of."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

import anyio

from ci_platform.errors import UnavailableError
from dynflow.engines import InstanceRef
from dynflow.types import HistoryEvent

_log = logging.getLogger(__name__)

_ENDS = frozenset(
    {"wait.started", "workflow.paused", "workflow.completed", "workflow.errored", "workflow.terminated"}
)


class Keeper(Protocol):
    """What keeps something for runs: a sandbox, or who runs commands."""

    async def release(self, scope: str) -> None:
        """Let go of what is kept for a run and not in use now."""


class Releases:
    """Run ids, and a service that has each sandbox let go of what it keeps for them. On one event loop."""

    def __init__(self, keepers: Iterable[Keeper], workflow: str) -> None:
        self._keepers, self._workflow = list(keepers), workflow
        self._due: dict[str, None] = {}
        self._more = anyio.Event()

    def listen(self, ref: InstanceRef, event: HistoryEvent) -> None:
        """Take an event of the engine's: a run that waits or has ended holds no container."""
        if ref.workflow == self._workflow and event.type in _ENDS:
            self._due[ref.id] = None
            self._more.set()

    async def serve(self) -> None:
        """Let go, for ever. What an absent engine keeps is swept when the platform starts again."""
        while True:
            await self._more.wait()
            self._more = anyio.Event()
            while self._due:
                run_id = next(iter(self._due))
                del self._due[run_id]
                await self._release(run_id)

    async def _release(self, run_id: str) -> None:
        for keeper in self._keepers:
            try:
                await keeper.release(run_id)
            except UnavailableError as error:
                _log.warning("what run %s has kept cannot be let go of: %s", run_id, error)

"""What the platform asks of an engine's binding. The embedded engine and Temporal's both answer this."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from dynflow.types import HistoryEvent, InstanceStatus


class InstanceHandle(Protocol):
    """One instance. Errors are those of `dynflow.errors`."""

    async def status(self) -> InstanceStatus:
        """Return what is known of it."""

    async def terminate(self) -> None:
        """End it. IllegalMoveError if it ended already."""

    async def restart(self, from_step: tuple[str, int] | tuple[str, int, str] | None = None) -> None:
        """Run it again, keeping the results from before `from_step`."""

    async def delete(self) -> object:
        """Remove it and all it has; its id is free."""

    async def send_event(self, *, type: str, payload: Any = None) -> None:  # noqa: A002 - dynflow's public name
        """Send it an event."""

    def subscribe(self, cursor: int | None = None) -> AsyncIterator[HistoryEvent]:
        """Yield its history after `cursor`, then what happens, until it has ended."""


class WorkflowsBinding(Protocol):
    """The binding of the workflow that all runs are instances of."""

    async def create(self, *, id: str, params: Any) -> Any:  # noqa: A002 - dynflow's public name
        """Create an instance, durably queued. InstanceExistsError if the id is taken."""

    async def fork(
        self,
        source_id: str,
        *,
        before: tuple[str, int],
        id: str,  # noqa: A002 - dynflow's public name
        params: Any,
    ) -> Any:
        """Create an instance with what another one had finished before a step. Errors as of `create` and `get`."""

    async def get(self, id: str) -> Any:  # noqa: A002 - dynflow's public name
        """Return the InstanceHandle. InstanceNotFoundError if there is none."""


class Layers(Protocol):
    """The workspaces of runs, as far as a rerun touches them."""

    async def rewind_run(self, run_id: str, steps: Collection[tuple[str, int]]) -> None:
        """Forget what these steps (name, count) changed in the run's workspaces."""

    async def delete_run(self, run_id: str) -> None:
        """Remove the run's workspaces."""

    def rerunning(self, run_id: str) -> AbstractAsyncContextManager[None]:
        """Keep the run's workspaces until it is open again; ConflictError where they were collected."""

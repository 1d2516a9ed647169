"""The engine's instances of runs, and what each run may be taken for."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from typing import Any

from ci_platform.capabilities import RunIdentity
from ci_platform.errors import NotFoundError, UnavailableError
from ci_platform.model import Run, RunFork
from ci_platform.store import Store, Transaction, col
from dynflow.errors import StorageError
from dynflow.router import DynamicWorkflowBinding
from dynflow.types import HistoryEvent, InstanceStatus

# Identities in memory; what a run is never changes.
_REMEMBERED = 10_000


class RunInstances:
    """The instances of runs: each is created in the envelope and the scope of its repository."""

    def __init__(self, binding: Any, identities: StoredIdentities) -> None:
        self._binding, self._identities = binding, identities

    async def create(self, *, id: str, params: Any) -> Any:  # noqa: A002 - the binding's name
        """Create a run's instance. `params["repo"]` is the tenant that it counts for."""
        if "what_if" not in params:
            # From the run's row, as these parameters are: its first isolate need not ask the database again.
            self._identities.remember(
                RunIdentity(id, params["repo"], params["sha"], params["pr"], params["trusted"])
            )
        with answering():
            return await self._of(id, params).create(id=id, params=params)

    async def fork(
        self,
        source_id: str,
        *,
        before: tuple[str, int],
        id: str,  # noqa: A002 - the binding's name
        params: Any,
    ) -> Any:
        """Create a run's instance with what another run of its repository had finished before a step."""
        with answering():
            return await self._of(id, params).fork(source_id, before=before, id=id, params=params)

    def _of(self, run_id: str, params: Any) -> DynamicWorkflowBinding:
        return DynamicWorkflowBinding(self._binding, {"tenant_id": params["repo"], "run_id": run_id})

    async def get(self, id: str) -> RunInstance:  # noqa: A002 - the binding's name
        """Return a run's instance."""
        binding = self._binding
        with suppress(NotFoundError):  # its row is gone: the engine may still know whose it is
            repo = (await self._identities.identity(id)).repo
            binding = DynamicWorkflowBinding(self._binding, {"tenant_id": repo, "run_id": id})
        with answering():
            return RunInstance(await binding.get(id))


class RunInstance:
    """One run's instance: what the platform asks of it, with UnavailableError where its engine cannot do it now."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance

    async def status(self) -> InstanceStatus:
        """Return what is known of it."""
        with answering():
            status: InstanceStatus = await self._instance.status()
            return status

    async def terminate(self) -> None:
        """End it."""
        with answering():
            await self._instance.terminate()

    async def restart(self, from_step: tuple[str, int] | tuple[str, int, str] | None = None) -> None:
        """Run it again."""
        with answering():
            await self._instance.restart(from_step)

    async def delete(self) -> object:
        """Remove it."""
        with answering():
            return await self._instance.delete()

    async def send_event(self, *, type: str, payload: Any = None) -> None:  # noqa: A002 - dynflow's public name
        """Send it an event."""
        with answering():
            await self._instance.send_event(type=type, payload=payload)

    async def subscribe(self, cursor: int | None = None) -> AsyncGenerator[HistoryEvent, None]:
        """Yield its history."""
        with answering():
            async with aclosing(self._instance.subscribe(cursor)) as events:
                async for event in events:
                    yield event


@contextmanager
def answering() -> Iterator[None]:
    """Say of an engine that has no room or no server, in the block, what is true of it: that it passes."""
    try:
        yield
    except StorageError as error:
        raise UnavailableError(f"what keeps runs cannot do it now: {error}") from error


class StoredIdentities:
    """What runs may be taken for, from the rows that their deliveries made."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, RunIdentity] = {}

    async def identity(self, run_id: str) -> RunIdentity:
        """Return what the run was started as. Raises NotFoundError."""
        found = self._known.get(run_id)
        if found is None:
            found = await self._read(run_id)
            self.remember(found)
        return found

    def remember(self, identity: RunIdentity) -> None:
        """Keep an identity at hand."""
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[identity.run_id] = identity

    async def _read(self, run_id: str) -> RunIdentity:
        def find(tx: Transaction) -> RunIdentity:
            run = tx.first(Run, col(Run.id) == run_id)
            if run is None:
                raise NotFoundError(f"there is no run {run_id:.100}")
            identity = RunIdentity(run.id, run.repo, run.sha, run.pr, run.trusted)
            fork = None if run.forked_from is None else tx.get(RunFork, run_id)
            return (
                identity
                if fork is None
                else replace(identity, code=fork.code, ancestors=tuple(fork.ancestors))
            )

        return await self._store.read(find)

"""The engine's instances of runs, and what each run may be taken for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ci_platform.capabilities import RunIdentity
from ci_platform.errors import NotFoundError
from ci_platform.model import Run, RunFork
from ci_platform.store import Store, Transaction, col
from dynflow.router import DynamicWorkflowBinding

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
        return await self._of(id, params).fork(source_id, before=before, id=id, params=params)

    def _of(self, run_id: str, params: Any) -> DynamicWorkflowBinding:
        return DynamicWorkflowBinding(self._binding, {"tenant_id": params["repo"], "run_id": run_id})

    async def get(self, id: str) -> Any:  # noqa: A002 - the binding's name
        """Return a run's instance."""
        return await self._binding.get(id)


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

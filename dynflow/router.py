"""Route one registered workflow to the code of many tenants: the envelope, the wrapped binding, the dispatch.

The metadata in an envelope routes; it does not authorise. What a wrapped binding can reach is decided by the
engine's scope for its tenant.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dynflow.errors import InvalidArgumentError, MissingDispatcherMetadataError
from dynflow.instance import check_options, is_list
from dynflow.isolates import Capability, WrappedBinding
from dynflow.loop import outside
from dynflow.types import WorkflowEvent
from dynflow.workflow import WorkflowEntrypoint, WorkflowStep, awaitable

METADATA_KEY = "__dispatcher_metadata"


class Runner(Protocol):
    """Anything with `run(event, step)`."""

    def run(self, event: Any, step: Any) -> Awaitable[Any]:
        """Run the tenant's workflow."""


@dataclass(frozen=True, slots=True)
class LoadContext:
    """What `load_runner` gets: the envelope's metadata, and `env` and `ctx` of the dispatching entrypoint."""

    metadata: Any
    env: Any
    ctx: Any


LoadRunner = Callable[[LoadContext], Runner | Awaitable[Runner]]


class DynamicWorkflowBinding(Capability):
    """The `WORKFLOWS` of one tenant: puts `metadata` around what the tenant passes to `create`.

    `binding` is the underlying workflow binding, or a function that returns it, asked at every call.
    """

    def __init__(self, binding: Any, metadata: Any) -> None:
        self._binding, self._metadata = binding, metadata

    async def create(self, id: str | None = None, params: Any = None, retention: Any = None) -> Any:  # noqa: A002 - the contract's name
        """Create an instance for this tenant; returns its handle."""
        options = {"id": id, "params": params, "retention": retention}
        given = {key: value for key, value in options.items() if value is not None}
        return await self._target().create(**self._wrap(given))

    async def create_batch(self, batch: Sequence[Mapping[str, Any]]) -> Any:
        """Create 1 to 100 instances; existing ids are left out of the result."""
        if not is_list(batch):  # how many it may hold is the underlying binding's matter
            raise InvalidArgumentError(f"a batch is a list of dicts, not {batch!r:.100}")
        # Checked before the envelope is around them: the metadata is nothing that messages should show.
        return await self._target().create_batch([self._wrap(check_options(item)) for item in batch])

    async def fork(
        self,
        source_id: str,
        *,
        before: Sequence[Any],
        id: str | None = None,  # noqa: A002 - the contract's name
        params: Any = None,
        retention: Any = None,
    ) -> Any:
        """Create an instance that has what another one of this tenant had finished before a step."""
        given: Mapping[str, Any] = {} if params is None else self._wrap({"params": params})
        return await self._target().fork(source_id, before=before, id=id, retention=retention, **given)

    async def get(self, id: str) -> Any:  # noqa: A002 - the contract's name
        """Return the handle of an instance of this tenant."""
        return await self._target().get(id)

    async def delete_batch(self, ids: Sequence[str]) -> Any:
        """Delete instances of this tenant."""
        return await self._target().delete_batch(ids)

    def _wrap(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {**options, "params": {METADATA_KEY: self._metadata, "params": options.get("params")}}

    def _target(self) -> Any:
        binding = self._binding() if callable(self._binding) else self._binding
        scope = getattr(
            binding, "for_metadata", None
        )  # engines reach only this tenant's instances through it
        return scope(self._metadata) if scope is not None else binding


def wrap_workflow_binding(metadata: Any, binding_name: str = "WORKFLOWS") -> WrappedBinding:
    """Return what to put into `WorkerCode.env` so that the tenant's workflows run with `metadata`."""
    return WrappedBinding(metadata, binding_name)


async def dispatch_workflow(
    context: Any, event: WorkflowEvent, step: WorkflowStep, load_runner: LoadRunner
) -> Any:
    """Open the envelope, load the runner, run it. `context` has `env` and `ctx`.

    Raises MissingDispatcherMetadataError where there is no envelope; errors of loader and run pass unchanged.
    """
    payload = event.payload
    if not isinstance(payload, Mapping) or METADATA_KEY not in payload:
        raise MissingDispatcherMetadataError(
            f"instance {event.instance_id!r} of {event.workflow_name!r} has no {METADATA_KEY!r} in its params: "
            "create it through wrap_workflow_binding(metadata) or DynamicWorkflowBinding(binding, metadata)"
        )
    params = payload.get("params")
    loaded = load_runner(LoadContext(payload[METADATA_KEY], context.env, context.ctx))
    runner = await outside(loaded) if inspect.isawaitable(loaded) else loaded
    if not callable(getattr(runner, "run", None)):
        raise InvalidArgumentError(
            f"load_runner returned {runner!r:.200}: it must return something with run(event, step)"
        )
    opened = replace(event, payload={} if params is None else params)
    return await awaitable(runner.run(opened, step), runner.run)


def create_dynamic_workflow_entrypoint(load_runner: LoadRunner) -> type[WorkflowEntrypoint]:
    """Return the entrypoint class to register: every `run` asks `load_runner` for the tenant's code."""

    class DynamicWorkflow(WorkflowEntrypoint):
        """Runs whatever workflow the envelope's metadata routes to."""

        async def run(self, event: WorkflowEvent, step: WorkflowStep) -> Any:
            return await dispatch_workflow(self, event, step, load_runner)

    return DynamicWorkflow
